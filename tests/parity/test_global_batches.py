"""The same loaders give every engine the same samples in the same global batches, and metrics see each of them once."""

import functools
import importlib.util
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from launching import launch_command, with_devices

SCRIPT = Path(__file__).with_name("global_batches.py")
HAS_JAX, HAS_XLA = (importlib.util.find_spec(name) is not None for name in ("jax", "torch_xla"))


@functools.cache
def answers(backend: str, processes: int) -> dict:
    """Over two data shards: two processes, or one process with two devices."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        devices = str(2 // processes)
        environment = {**os.environ, **with_devices(devices), "CPU_NUM_DEVICES": devices}
        command = launch_command(backend, processes, SCRIPT, output)
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(output.read_text())


def test_metrics_are_told_of_every_sample_once_on_two_processes():
    found = answers("torch", 2)
    metrics = {
        name: [row[1] for row in rows] for name, rows in found.items() if name in ("whole", "tiny", "stream", "split")
    }
    flat = {name: [number for batch in batches for number in batch] for name, batches in metrics.items()}
    assert flat == {"whole": [*range(16)], "tiny": [0], "stream": [*range(19)], "split": [*range(22)]}
    for rows in found["shuffled"]:
        assert sorted(number for _, real in rows for number in real) == [*range(22)]
        assert [len(everyone) for everyone, _ in rows] == [8, 8, 8]
    assert [len(real) for _, real in found["skipped"]] == [8, 6]
    assert found["dropped"] == [[[*range(8)]] * 2, [[*range(8, 16)]] * 2]
    assert found["containers"][-1] == [[6, 7, 8, 9, 10], [f"sample {number}" for number in range(6, 11)]]
    assert found["nested"] == [[[[0, 1, 2, 3], [4]], outer] for outer in ([0, 1, 2, 3], [4, 5, 6, 7], [8])]
    assert found["outside of loops"] == [1, 2, 1, 2]


OTHERS = [
    pytest.param("jax", 1, marks=pytest.mark.skipif(not HAS_JAX, reason="jax is not installed")),
    pytest.param("jax", 2, marks=pytest.mark.skipif(not HAS_JAX, reason="jax is not installed")),
    pytest.param("xla", 1, marks=pytest.mark.skipif(not HAS_XLA, reason="torch_xla is not installed")),
]


@pytest.mark.parametrize(("backend", "processes"), OTHERS)
def test_global_batches_and_metrics_are_those_of_torch(backend, processes):
    found, expected = answers(backend, processes), answers("torch", 2)
    for name in expected:
        assert found[name] == expected[name], name
    if backend == "jax":
        rows = [[[*range(8)]] * 2, [[*range(8, 16)]] * 2, [[*range(16, 22), 0, 1], [*range(16, 22)]]]
        assert found["numpy"] == rows
        assert found["numpy, skipped"] == rows[2:]
