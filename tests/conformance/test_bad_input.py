"""Mistakes at the level of user code, engine by engine: a PolyaccelError that says what, why and the way out, and nothing changed."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from polyaccel import Accelerator, PolyaccelError
from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel_torch.dialect.case import TorchCase

torch = pytest.importorskip("torch", reason="every environment of scripts/test has torch")
HAS_JAX = importlib.util.find_spec("flax") is not None
needs_jax = pytest.mark.skipif(not HAS_JAX, reason="the xla environment has no jax; the main one runs these")
CASE = TorchCase("jax")


class Branches(torch.nn.Module):
    """The next step depends on a value."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x):
        y = self.inner(x)
        return y if y.sum() > 0 else -y


class Gate(torch.nn.Module):
    def forward(self, x):
        return x[x > 0]


class Gated(torch.nn.Module):
    """A mask whose shape depends on values, inside a named submodule."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate = torch.nn.Linear(3, 2), Gate()

    def forward(self, x):
        return self.gate(self.inner(x))


def loss_of(model, batch):
    return model(batch).mean()


@needs_jax
@pytest.mark.parametrize("form", ["function", "train_step", "value"])
def test_a_branch_on_a_value_names_the_operation_the_line_and_the_way_out(form):
    accelerator = Accelerator(backend="jax", cpu=True)
    model = Branches()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batch = torch.ones(8, 3)
    take = {
        "value": lambda: accelerator.backward(loss_of(model, batch)),
        "function": lambda: accelerator.backward(loss_of, model, batch),
        "train_step": lambda: accelerator.train_step(loss_of, model, optimizer)(batch),
    }
    with pytest.raises(PolyaccelError) as caught:
        take[form]()
    text = str(caught.value)
    assert "Branches" in text or "y.sum() > 0" in text
    assert "test_bad_input.py" in text
    assert "torch.where" in text
    assert caught.value.hint


@needs_jax
def test_a_shape_that_depends_on_values_names_the_module_path():
    accelerator = Accelerator(backend="jax", cpu=True)
    model = accelerator.prepare(Gated())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PolyaccelError) as caught:
        accelerator.backward(loss_of, model, torch.ones(8, 3))
    assert "gate" in str(caught.value).lower()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(np.asarray(value), before[name])


@needs_jax
def test_an_operation_without_a_lowering_is_named():
    library = torch.library.Library("polyaccel_test", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CPU")
    library.impl("double", lambda x: torch.empty_like(x), "Meta")

    class Custom(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 2)

        def forward(self, x):
            with torch.no_grad():
                scale = torch.ops.polyaccel_test.double(x)
            return self.inner(x * scale)

    accelerator = Accelerator(backend="jax", cpu=True)
    model = accelerator.prepare(Custom())
    with pytest.raises(UnsupportedError) as caught:
        accelerator.backward(loss_of, model, torch.ones(8, 3))
    assert "polyaccel_test.double" in str(caught.value)
    assert "test_bad_input.py" in str(caught.value)
    assert "torch" in caught.value.hint


@needs_jax
def test_a_jax_value_given_to_backward_names_the_two_other_forms():
    from conformance.flax_case import FlaxCase

    case = FlaxCase("jax")
    accelerator = Accelerator(backend="jax", cpu=True)
    model = accelerator.prepare(case.model(np.ones((3, 2), np.float32), np.zeros(2, np.float32)))
    loss = case.loss(model, {"x": np.ones((8, 3), np.float32), "y": np.ones((8, 2), np.float32)})
    with pytest.raises(
        UnsupportedError, match=r"accelerator\.backward\(loss_fn, model, batch\), or use accelerator\.train_step"
    ):
        accelerator.backward(loss)


@needs_jax
@pytest.mark.parametrize("form", ["function", "train_step"])
def test_a_batch_that_cannot_be_cut_names_both_numbers(form):
    accelerator = Accelerator(backend="jax", cpu=True)
    assert accelerator.num_data_shards == 4
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step = accelerator.train_step(loss_of, model, optimizer)
    take = step if form == "train_step" else lambda batch: accelerator.backward(loss_of, model, batch)
    with pytest.raises(PolyaccelError, match=r"(?s)6.*4.*hint"):
        take(torch.ones(6, 3))


@needs_jax
def test_a_torch_and_a_flax_object_cannot_train_together():
    import optax

    accelerator = Accelerator(backend="jax", cpu=True)
    with pytest.raises(PrepareError, match="torch and a flax object"):
        accelerator.prepare(torch.nn.Linear(1, 1), optax.sgd(0.1))


def test_a_loss_that_was_detached_is_refused():
    accelerator = Accelerator(backend="torch", cpu=True)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    with pytest.raises(PolyaccelError, match="hint"):
        accelerator.backward(model(torch.ones(8, 3)).mean().detach())


def test_tensors_are_not_prepared():
    with pytest.raises(PrepareError, match=r"argument 1 of prepare is an array of shape \(2,\)"):
        Accelerator(backend="torch", cpu=True).prepare(torch.nn.Linear(1, 1), torch.ones(2))


@needs_jax
def test_what_a_backend_does_not_declare_is_refused_before_anything_starts():
    with pytest.raises(UnsupportedError, match=r"offload='cpu' .*is not supported by backend 'jax'"):
        Accelerator(backend="jax", cpu=True, offload="cpu")


@pytest.mark.parametrize(("backend", "count"), [("xla", 2), ("jax", 3)])
def test_more_processes_than_devices_names_both_numbers(backend, count, monkeypatch):
    from polyaccel.registry import load_backend

    if not load_backend(backend).probe().is_usable:
        pytest.skip(f"{backend} is tested in its own environment")
    if backend == "jax":
        monkeypatch.setattr("polyaccel_jax.backend._count_gpus", lambda: 2)
        with pytest.raises(PolyaccelError, match="3 processes cannot share 2 GPUs"):
            load_backend(backend).worker_slots(count, use_cpu=False)
        return
    with pytest.raises(PolyaccelError, match="2"):
        load_backend(backend).worker_slots(count, use_cpu=False)


@needs_jax
def test_a_torch_script_may_ask_for_its_device_and_gather_before_anything_is_prepared():
    script = (
        "import torch\nfrom polyaccel import Accelerator\na = Accelerator(backend='jax', cpu=True)\n"
        "model = torch.nn.Linear(2, 1).to(a.device)\nvalue = a.reduce(a.gather(torch.ones(2)), 'mean', scale=2.0)\n"
        "assert isinstance(value, torch.Tensor) and value.tolist() == [2.0, 2.0], value\nprint(a.device)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "cpu\n", done.stderr
