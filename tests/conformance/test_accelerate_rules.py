"""Accelerate's rules of accumulation, optimizers, schedulers and precision, in a torch script on every engine that is here."""

import copy
import math
import pickle

import pytest

from polyaccel import Accelerator
from polyaccel.errors import PrepareError, UnsupportedError
from polyaccel.optimizer import AcceleratedOptimizer
from polyaccel.registry import load_backend
from polyaccel.scheduler import AcceleratedScheduler
from polyaccel.utils import GradientAccumulationPlugin

torch = pytest.importorskip("torch", reason="the rules are those of torch scripts")
from torch import nn  # noqa: E402
from torch.optim.lr_scheduler import OneCycleLR, StepLR  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

ENGINES = [name for name in ("torch", "xla", "jax") if load_backend(name).probe().is_usable]
every_engine = pytest.mark.parametrize("engine", ENGINES)


def on(engine, **arguments):
    return Accelerator(backend=engine, cpu=True, **arguments)


class Training:
    """One weight whose gradient is 1 for every batch of ones; `updates` batches a pass, on any number of data shards."""

    def __init__(self, accelerator, num_batches=6):
        self.accelerator = accelerator
        self.module = nn.Linear(1, 1, bias=False)
        self.inner = torch.optim.SGD(self.module.parameters(), lr=0.5)
        ones = torch.ones(num_batches * accelerator.num_data_shards, 1)
        self.model, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            self.module, self.inner, StepLR(self.inner, 1, gamma=0.5), DataLoader(TensorDataset(ones), batch_size=1)
        )

    def grad(self):
        return next(self.model.parameters()).grad.item()

    def run(self):
        """(gradient, whether it is a real step, micro batches counted) of every batch of a pass."""
        accelerator, seen = self.accelerator, []
        for (x,) in self.loader:
            with accelerator.accumulate(self.model):
                accelerator.backward(self.model(x).mean())
                seen.append((self.grad(), accelerator.sync_gradients, accelerator.step))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return seen


# -- gradient accumulation ---------------------------------------------------------------------------------------------------


@every_engine
def test_six_batches_in_windows_of_four_update_after_the_fourth_and_the_last(engine):
    training = Training(on(engine, gradient_accumulation_steps=4))
    assert training.accelerator.sync_gradients  # outside of accumulate
    expected = [(0.25, False, 1), (0.5, False, 2), (0.75, False, 3), (1.0, True, 4), (0.25, False, 5), (0.5, True, 0)]
    assert training.run() == expected
    assert training.run() == expected  # every pass starts a window of its own
    assert next(training.model.parameters()).grad is None  # zero_grad drops gradients


@every_engine
def test_backward_divides_outside_of_accumulate_too(engine):
    training = Training(on(engine, gradient_accumulation_steps=4))
    (x,) = next(iter(training.loader))
    training.accelerator.backward(training.model(x).mean())
    assert training.grad() == 0.25


@every_engine
def test_without_sync_with_dataloader_windows_go_on_from_pass_to_pass(engine):
    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    training = Training(on(engine, gradient_accumulation_plugin=plugin))
    steps = [is_real for _, is_real, _ in (*training.run(), *training.run())]
    assert [index for index, is_real in enumerate(steps) if is_real] == [3, 7, 11]


@every_engine
def test_a_scheduler_counts_the_batches_it_waits_for_unless_told_not_to(engine):
    counts = {}
    for adjusts in (True, False):
        plugin = GradientAccumulationPlugin(num_steps=4, adjust_scheduler=adjusts)
        training = Training(on(engine, gradient_accumulation_plugin=plugin))
        training.run()
        counts[adjusts] = training.scheduler._step_count
    updates = 2 * training.accelerator.num_data_shards
    assert counts == {True: 1 + 4 + updates, False: 1 + updates}


@every_engine
def test_every_accelerator_counts_for_itself_and_may_be_told(engine):
    first = on(engine, gradient_accumulation_steps=4)
    second = on(engine)
    assert (first.gradient_accumulation_steps, second.gradient_accumulation_steps) == (4, 1)
    first.gradient_accumulation_steps = 2
    first.sync_gradients = False
    assert first.gradient_state.num_steps == 2
    assert second.sync_gradients


@every_engine
def test_a_loop_that_is_left_leaves_no_active_loader(engine):
    training = Training(on(engine))
    state = training.accelerator.gradient_state
    for _ in training.loader:
        assert state.active_dataloader is training.loader
        assert state.in_dataloader
        assert not pickle.loads(pickle.dumps(training.scheduler))._state.in_dataloader
        state._set_sync_gradients(False)
        assert not training.accelerator.sync_gradients
        break
    assert state.active_dataloader is None
    assert (state.end_of_dataloader, state.remainder) == (False, -1)


@every_engine
def test_no_sync_and_its_trigger_change_no_gradient_of_one_process(engine):
    training = Training(on(engine))
    (x,) = next(iter(training.loader))
    with training.accelerator.no_sync(training.model):
        loss = training.model(x).mean()
    with training.accelerator.trigger_sync_in_backward(training.model):
        training.accelerator.backward(loss)
    assert training.grad() == 1.0
    with pytest.raises(PrepareError, match="not a prepared model"):
        training.accelerator.trigger_sync_in_backward(nn.Linear(1, 1))


# -- optimizers --------------------------------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.SGD):
    """An optimizer with two modes."""

    mode = "none"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


@every_engine
def test_a_prepared_optimizer_is_one_of_torch_around_the_users_own(engine):
    accelerator = on(engine)
    module = nn.Linear(1, 1)
    inner = torch.optim.SGD(module.parameters(), lr=0.5)
    _, optimizer = accelerator.prepare(module, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert optimizer.optimizer is inner
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.defaults is inner.defaults
    assert not optimizer.step_was_skipped
    assert not accelerator.optimizer_step_was_skipped
    optimizer.train()  # nothing, for an optimizer without modes
    again = pickle.loads(pickle.dumps(optimizer))
    assert isinstance(again, torch.optim.Optimizer)
    assert again.param_groups[0]["lr"] == 0.5
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.5


@pytest.mark.skipif("torch" not in ENGINES, reason="modes are the optimizer's own on torch")
def test_the_modes_of_an_optimizer_are_reached():
    accelerator = on("torch")
    module = nn.Linear(1, 1)
    inner = ScheduleFree(module.parameters(), lr=0.5)
    _, optimizer = accelerator.prepare(module, inner)
    optimizer.train()
    assert inner.mode == "train"
    optimizer.eval()
    assert inner.mode == "eval"


@every_engine
def test_a_step_that_a_script_calls_skipped_is_so_until_the_next_real_one(engine):
    training = Training(on(engine))
    shards = training.accelerator.num_data_shards
    training.optimizer._is_overflow = True
    assert training.optimizer.step_was_skipped
    assert training.accelerator.optimizer_step_was_skipped
    training.scheduler.step()
    assert training.scheduler.scheduler.last_epoch == 0  # a skipped update moves no schedule
    (x,) = next(iter(training.loader))
    training.accelerator.backward(training.model(x).mean())
    training.optimizer.step()
    assert not training.optimizer._is_overflow
    training.scheduler.step()
    assert training.scheduler.scheduler.last_epoch == shards


fp16_engines = [name for name in ENGINES if "fp16" in load_backend(name).capabilities.mixed_precision]


@pytest.mark.parametrize("engine", fp16_engines)
def test_under_fp16_an_overflow_skips_the_step_and_says_so_until_the_next_one(engine):
    training = Training(on(engine, mixed_precision="fp16"))
    model, optimizer, accelerator = training.model, training.optimizer, training.accelerator
    before = next(model.parameters()).detach().clone()
    (x,) = next(iter(training.loader))
    accelerator.backward((model(x) * math.inf).mean())
    optimizer.step()
    assert optimizer.step_was_skipped
    assert accelerator.optimizer_step_was_skipped
    assert torch.equal(next(model.parameters()).detach(), before)
    training.scheduler.step()
    assert training.scheduler.scheduler.last_epoch == 0
    optimizer.zero_grad()
    accelerator.backward(model(x).mean())
    accelerator.unscale_gradients()
    accelerator.unscale_gradients(optimizer)  # once per update
    assert training.grad() == 1.0
    optimizer.step()
    assert not accelerator.optimizer_step_was_skipped
    assert next(model.parameters()).item() == pytest.approx(before.item() - 0.5)


@every_engine
def test_without_a_loss_scale_gradients_are_as_they_are(engine):
    training = Training(on(engine))
    (x,) = next(iter(training.loader))
    training.accelerator.backward(training.model(x).mean())
    training.accelerator.unscale_gradients(training.optimizer)
    assert training.grad() == 1.0
    with pytest.raises(UnsupportedError, match="lomo_backward"):
        training.accelerator.lomo_backward(None, 0.1)


# -- schedulers --------------------------------------------------------------------------------------------------------------

# The order of calls is not what these are about.
without_order = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@without_order
@every_engine
@pytest.mark.parametrize("splits", [False, True])
def test_an_update_moves_a_schedule_once_per_data_shard_or_once_with_split_batches(engine, splits):
    accelerator = on(engine, split_batches=splits)
    module = nn.Linear(1, 1)
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    own = StepLR(inner, 1, gamma=0.5)
    _, _, scheduler = accelerator.prepare(module, inner, own)
    assert isinstance(scheduler, AcceleratedScheduler)
    assert scheduler.scheduler is own
    scheduler.step()
    steps = 1 if splits else accelerator.num_data_shards
    assert scheduler.get_last_lr() == [0.5**steps] == [inner.param_groups[0]["lr"]]


@without_order
@every_engine
def test_a_schedule_with_an_end_stays_there(engine):
    accelerator = on(engine)
    module = nn.Linear(1, 1)
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    _, _, scheduler = accelerator.prepare(module, inner, OneCycleLR(inner, max_lr=0.1, total_steps=6))
    for _ in range(9):
        scheduler.step()
    assert scheduler.scheduler._step_count == 7  # torch counts from one


@without_order
@every_engine
def test_a_free_schedule_moves_once_per_call_whatever_the_optimizer_did(engine):
    training = Training(on(engine, step_scheduler_with_optimizer=False, gradient_accumulation_steps=4))
    training.run()
    assert training.scheduler.scheduler.last_epoch == 6


@without_order
@every_engine
def test_a_schedule_follows_its_own_optimizer_or_all_where_it_has_none(engine):
    accelerator = on(engine)
    modules = [nn.Linear(1, 1), nn.Linear(1, 1)]
    inner = [torch.optim.SGD(module.parameters(), lr=1.0) for module in modules]
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = [StepLR(inner[0], 1), StepLR(inner[1], 1), StepLR(foreign, 1)]
    *_, one, two, first, second, other = accelerator.prepare(*modules, *inner, *schedules)
    assert first.optimizers == [one]
    assert second.optimizers == [two]
    assert other.optimizers == [one, two]
    two._is_overflow = True
    for scheduler in (first, second, other):
        scheduler.step()
    assert [s.scheduler.last_epoch for s in (first, second, other)] == [accelerator.num_data_shards, 0, 0]
    again = pickle.loads(pickle.dumps(first))
    assert again.scheduler.last_epoch == accelerator.num_data_shards


# -- prepare and back --------------------------------------------------------------------------------------------------------


@every_engine
def test_prepare_keeps_the_order_and_what_is_prepared_or_unknown(engine):
    training = Training(on(engine))
    accelerator, model, optimizer = training.accelerator, training.model, training.optimizer
    assert accelerator.prepare(model, None, optimizer, [1, 2]) == (model, None, optimizer, [1, 2])
    assert accelerator.prepare(training.loader) is training.loader
    assert accelerator.prepare_model(model) is model
    assert accelerator._models == [model]
    assert accelerator._optimizers == [optimizer]
    assert accelerator._schedulers == [training.scheduler]
    assert accelerator._dataloaders == [training.loader]
    for prepared in (model, optimizer, training.scheduler, training.loader):
        assert prepared._is_accelerate_prepared
    with pytest.raises(PrepareError, match="device_placement has 1 values for 2 objects"):
        accelerator.prepare(model, optimizer, device_placement=[True])
    assert accelerator.free_memory(model, optimizer) == [None, None]
    assert (accelerator._models, accelerator._optimizers, accelerator._schedulers) == ([], [], [])


@every_engine
def test_who_places_everything_itself_refuses_to_leave_a_model_where_it_is(engine):
    accelerator = on(engine)
    model, loader = nn.Linear(1, 1), DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=2)
    if "host_placement" not in load_backend(engine).capabilities.features:
        with pytest.raises(UnsupportedError, match="device_placement=False for the model at position 1"):
            accelerator.prepare(loader, model, device_placement=[None, False])
        return
    assert accelerator.prepare(loader, model, device_placement=[False, False])[1] is model
    assert len(list(accelerator._dataloaders[0])) == 4


@every_engine
def test_unwrap_gives_the_users_module_and_takes_wrappers_off_any_other(engine):
    training = Training(on(engine))
    accelerator = training.accelerator
    assert accelerator.unwrap_model(training.model) is training.module
    assert accelerator.unwrap_model(training.module) is training.module
    other = nn.Linear(1, 1)
    assert accelerator.unwrap_model(nn.DataParallel(other)) is other
    compiled = torch.compile(nn.DataParallel(other), backend="eager")
    assert accelerator.unwrap_model(compiled, keep_torch_compile=False) is other
    assert accelerator.unwrap_model(compiled)._orig_mod is other
    other.hf_device_map = {"a": "cpu", "b": "disk"}
    assert accelerator.verify_device_map(nn.Sequential(other))
    assert not accelerator.verify_device_map(training.model)


@every_engine
def test_weights_of_a_module_that_is_not_prepared_are_saved_too(engine, tmp_path):
    from safetensors.torch import load_file

    accelerator = on(engine)
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
    module[1].weight = module[0].weight
    accelerator.save_model(nn.DataParallel(module), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {"0.weight", "0.bias", "1.bias"}  # tied ones once
    assert torch.equal(saved["0.weight"], module[0].weight.detach())
    state = accelerator.get_state_dict(module)
    assert state.keys() == module.state_dict().keys()
    assert not state["0.weight"].requires_grad
    with pytest.raises(PrepareError, match="not a prepared model"):
        accelerator.save_model(object(), tmp_path)


# -- precision ---------------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 8)

    def forward(self, x):
        y = self.linear(x)
        return {"y": [y, y.argmax(1)], "x": x}


def is_rounded(model, outputs):
    """Whether float32 outputs for ones were computed in bfloat16."""
    weight, bias = (parameter.detach().cpu() for parameter in model.parameters())
    error = (outputs["y"][0].detach().cpu() - (weight.sum(1) + bias)).abs().max().item()
    assert outputs["y"][0].dtype is torch.float32
    return 1e-4 < error < 0.05


@every_engine
def test_under_bf16_parameters_and_outputs_are_float32_and_the_inside_is_not(engine):
    accelerator = on(engine, mixed_precision="bf16")
    model = accelerator.prepare(Nested())
    outputs = model(torch.ones(accelerator.num_data_shards, 3, device=accelerator.device))
    assert is_rounded(model, outputs)
    assert outputs["x"].dtype is torch.float32
    assert outputs["y"][1].dtype is torch.int64
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.skipif("torch" not in ENGINES, reason="on the other engines the module itself is never wrapped")
def test_unwrapping_without_the_fp32_wrapper_computes_as_the_parameters_are():
    accelerator = on("torch", mixed_precision="bf16")
    model, x = accelerator.prepare(Nested()), torch.ones(1, 3)
    assert is_rounded(model, accelerator.unwrap_model(model)(x))
    assert is_rounded(model, pickle.loads(pickle.dumps(model))(x))  # a prepared model can be pickled as it is
    assert not is_rounded(model, accelerator.unwrap_model(model, keep_fp32_wrapper=False)(x))


# -- what a script asks ------------------------------------------------------------------------------------------------------


@every_engine
def test_settings_can_be_read_under_accelerates_names(engine, caplog):
    accelerator = on(engine, even_batches=False)
    assert (accelerator.split_batches, accelerator.even_batches, accelerator.dispatch_batches) == (False, False, None)
    assert not accelerator.use_seedable_sampler
    assert not accelerator.non_blocking
    assert not accelerator.use_stateful_dataloader
    assert not accelerator.multi_device
    assert accelerator.should_save_model
    assert accelerator.deepspeed_plugin is accelerator.state.deepspeed_plugin is None
    with caplog.at_level("WARNING"):
        for _ in range(2):
            with accelerator.maybe_context_parallel(buffers=[torch.ones(2)], buffer_seq_dims=[0]):
                pass
    assert sum("maybe_context_parallel cuts nothing" in record.message for record in caplog.records) <= 1
