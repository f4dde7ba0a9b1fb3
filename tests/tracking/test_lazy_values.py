"""Values that an engine still holds or has not computed yet: logged exactly, without making the engine compute or wait."""

import itertools
from importlib.util import find_spec

import pytest
from doubles import run_of

from polyaccel import Accelerator
from polyaccel.config.project import ProjectConfiguration

torch = pytest.importorskip("torch")


def training(backend, folder):
    """An accelerator, and a function that does one step of a small regression and calls `between` before backward."""
    accelerator = Accelerator(backend=backend, cpu=True, project_config=ProjectConfiguration(logging_dir=folder))
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = torch.randn(16, 4).to(accelerator.device)
    accelerator.init_trackers("lazy")

    def step(between=lambda loss: None):
        loss = model(x).pow(2).mean()
        between(loss)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return accelerator, step


def _has(module):
    return find_spec(module) is not None


# torch_xla has an environment of its own, and wants to be there before torch's autograd has run at all.
BACKENDS = ["xla"] if _has("torch_xla") else ["torch", "jax"] if _has("flax") else ["torch"]
needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="needs jax and flax")


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_running_sums_are_logged_as_they_were_at_the_call(tmp_path, backend):
    accelerator, step = training(backend, tmp_path)
    losses, total = [], torch.zeros((), device=accelerator.device)
    for number in range(6):
        losses.append(step())
        total += losses[-1].detach()  # in place: the tensor of the last log changes
        accelerator.log({"loss": losses[-1], "total": total}, step=number)
    accelerator.end_training()
    expected = [loss.item() for loss in losses]
    run = run_of(accelerator)
    assert run.series("loss") == list(enumerate(expected))
    assert [value for _, value in run.series("total")] == pytest.approx(list(itertools.accumulate(expected)), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_logged_before_backward_is_the_loss_of_that_step(tmp_path, backend):
    accelerator, step = training(backend, tmp_path)
    losses = [
        step(lambda loss, number=number: accelerator.log({"loss": loss, "plain": 1.5}, step=number))
        for number in range(4)
    ]
    accelerator.log({"last": 1.0}, step=4)
    accelerator.end_training()
    entries = list(run_of(accelerator).metrics())
    assert [entry.step for entry in entries] == [0, 1, 2, 3, 4], "in the order of the calls"
    assert [entry.values["loss"] for entry in entries[:4]] == [loss.item() for loss in losses]


@needs_jax
def test_logging_a_bridged_loss_makes_nothing_compute_and_nobody_wait(tmp_path, monkeypatch):
    from polyaccel_bridges.tape import Recorder
    from polyaccel_bridges.tensors import DeviceTensor

    accelerator, step = training("jax", tmp_path)
    step()
    forced = []
    for kind, name in ((Recorder, "compute"), (DeviceTensor, "host"), (DeviceTensor, "item")):
        real = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *args, real=real, name=name: forced.append(name) or real(self, *args)
        )
    for number in range(4):
        loss = step(lambda loss, number=number: accelerator.log({"before": loss}, step=number))
        accelerator.log({"after": loss}, step=number)
    accelerator.tracking.flush()
    assert forced == []
    accelerator.end_training()
    run = run_of(accelerator)
    assert run.series("before") == run.series("after")
    assert len(run.series("after")) == 4


@needs_jax
def test_every_compiled_program_is_an_event_of_the_run(tmp_path):
    accelerator, step = training("jax", tmp_path)
    accelerator.log({"loss": step()}, step=0)
    accelerator.end_training()
    compiled = list(run_of(accelerator).events("compile"))
    assert [event["program"] for event in compiled] == [event.program for event in accelerator.compile_events]
    assert compiled
    assert compiled[0]["cause"] == "first call"


@needs_jax
def test_a_bridged_value_that_no_step_computes_is_computed_at_the_next_log(tmp_path):
    accelerator, step = training("jax", tmp_path)
    loss = step()
    with torch.no_grad():
        doubled = loss * 2 + 1
        accelerator.log({"doubled": doubled}, step=0)
    accelerator.end_training()
    assert run_of(accelerator).series("doubled") == [(0, pytest.approx(loss.item() * 2 + 1))]
