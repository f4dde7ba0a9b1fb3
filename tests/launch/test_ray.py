"""`polyaccel launch --on ray`, on a Ray cluster of this machine. Runs where ray is installed (pip install 'polyaccel[ray]')."""

import importlib.util
import subprocess

import pytest
from launching import LAUNCH

from polyaccel.registry import load_backend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or not load_backend("jax").probe().is_usable, reason="needs ray and jax"
)
RAY = [*LAUNCH, "--on", "ray", "--ray.address", "local", "--backend", "jax", "--cpu"]


def launch(*arguments):
    return subprocess.run([*RAY, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "who.py"
    path.write_text(
        "import os, sys\nprint('process', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n"
        "sys.exit(int(sys.argv[1]) if os.environ['RANK'] == '1' else 0)\n"
    )
    return path


def test_two_actors_are_two_machines_of_one_job(script):
    two = ["--ray.share-machines", "--num-machines", 2, "--num-processes", 2]
    done = launch(*two, script, 0)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2" in done.stdout
    assert "process 1 of 2" in done.stdout
    done = launch(*two, script, 9)
    assert done.returncode == 9
    assert "machine 1 of 2 failed with exit code 9" in done.stderr


def test_a_cluster_without_room_is_named(script):
    done = launch("--ray.cpus-per-machine", 1000, "--ray.wait-s", 2, script, 0)
    assert done.returncode == 1
    assert "has no room for 1 machines with {'CPU': 1000} each within 2 s" in done.stderr
