"""The runtime is started before the first backward pass of the process, as a script must do that creates its Accelerator first."""

import pytest

from polyaccel import Accelerator


@pytest.fixture(scope="session", autouse=True)
def runtime():
    Accelerator(backend="xla", cpu=True)
