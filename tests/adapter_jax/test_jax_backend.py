"""The jax backend before and while it opens: probe, worker slots, the compilation cache, the random stream."""

import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax_engines import Mlp, batches, open_engine, train

from polyaccel.errors import BackendUnavailableError, LaunchError
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel_jax import backend as backend_module
from polyaccel_jax.backend import JaxBackend


def test_touching_the_backend_imports_no_framework():
    code = (
        "import sys; from polyaccel_jax.backend import JaxBackend; b = JaxBackend(); b.probe(); b.worker_slots(2, use_cpu=True);"
        "import polyaccel_jax.dialect; assert not {'jax', 'flax', 'optax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    real = backend_module.importlib.util.find_spec
    monkeypatch.setattr(
        backend_module.importlib.util, "find_spec", lambda name: None if name == "optax" else real(name)
    )
    probe = JaxBackend().probe()
    assert not probe.is_usable
    assert "optax" in probe.reason
    assert probe.cure == "pip install 'polyaccel[jax]'"
    with pytest.raises(BackendUnavailableError, match="optax is not installed"):
        JaxBackend().open(None, Rendezvous())


def test_one_process_drives_all_devices_and_more_share_them(monkeypatch):
    backend = JaxBackend()
    assert len(backend.worker_slots(None, use_cpu=False)) == 1
    assert [dict(slot.environment) for slot in backend.worker_slots(2, use_cpu=True)] == [{}, {}]
    monkeypatch.setattr(backend_module, "_count_gpus", lambda: 4)
    slots = backend.worker_slots(2, use_cpu=False)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0,1", "2,3"]
    with pytest.raises(LaunchError, match="3 processes cannot share 4 GPUs"):
        backend.worker_slots(3, use_cpu=False)


def test_processes_share_the_gpus_that_the_job_may_use_and_no_others(monkeypatch):
    backend = JaxBackend()
    monkeypatch.setattr(backend_module, "_count_gpus", lambda: 8)
    slots = backend.worker_slots(2, use_cpu=False, gpus=("2", "3", "6", "7"))
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2,3", "6,7"]
    names = ("GPU-5f1e", "MIG-77")  # CUDA_VISIBLE_DEVICES may name them by id
    slots = backend.worker_slots(2, use_cpu=False, gpus=names)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots] == list(names)
    with pytest.raises(LaunchError, match="2 processes cannot share 3 GPUs"):
        backend.worker_slots(2, use_cpu=False, gpus=("0", "1", "2"))
    with pytest.raises(LaunchError, match="GPU 9 is asked for, and this machine has 8"):
        backend.worker_slots(2, use_cpu=False, gpus=("8", "9")[::-1])
    assert [dict(slot.environment) for slot in backend.worker_slots(2, use_cpu=False, gpus=())] == [{}, {}]  # hidden


def test_the_engine_says_where_it_is():
    engine = open_engine(4)
    assert (engine.topology.num_devices, engine.topology.num_local_devices) == (4, 4)
    assert (engine.topology.process_index, engine.topology.num_processes) == (0, 1)
    assert engine.device in jax.devices()
    engine.synchronize()
    engine.close()
    engine.close()


CACHE_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import optax
from flax import nnx
from jax_engines import Mlp, batches, open_engine, train
settings = {} if sys.argv[2] == "auto" else {"compilation_cache": sys.argv[2]}
if sys.argv[2] == "auto":
    settings = {"compilation_cache": "auto"}
engine = open_engine(1, **settings)
model = engine.prepare_model(Mlp(nnx.Rngs(0)))
train(engine, model, engine.prepare_optimizer(optax.adam(0.1), model), batches(2))
"""


@pytest.mark.parametrize("setting", ["auto", "a folder", "off"])
def test_compiled_programs_are_kept_for_the_next_start(tmp_path, monkeypatch, request, setting):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = {"auto": tmp_path / "cache" / "polyaccel" / "jax", "a folder": tmp_path / "mine"}.get(setting)
    given = str(folder) if setting == "a folder" else setting
    subprocess.run([sys.executable, "-c", CACHE_SCRIPT, str(request.path.parent), given], check=True)
    if folder is None:
        assert not list(tmp_path.rglob("*"))
    else:
        assert any("step" in file.name for file in folder.iterdir())


def test_a_cache_folder_that_the_user_gave_to_jax_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        engine = open_engine(1, compilation_cache="auto")
        assert engine.compilation_cache_folder == tmp_path
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_seed_restarts_the_stream():
    engine = open_engine(seed=3)
    base, count = engine.current_key()
    assert count == 0
    engine.seed(4)
    other, _ = engine.current_key()
    assert not np.array_equal(jax.random.key_data(base), jax.random.key_data(other))
    engine.seed(3)
    again, _ = engine.current_key()
    np.testing.assert_array_equal(jax.random.key_data(base), jax.random.key_data(again))


def test_cpu_true_uses_cpu_devices():
    assert open_engine(1, cpu=True).device.platform == "cpu"


def test_a_step_is_finished_after_synchronize():
    engine = open_engine()
    model = engine.prepare_model(Mlp(nnx.Rngs(0)))
    train(engine, model, engine.prepare_optimizer(optax.sgd(0.1), model), batches(1))
    engine.synchronize()
    assert all(leaf.is_ready() for leaf in model._polyaccel_model.leaves)
