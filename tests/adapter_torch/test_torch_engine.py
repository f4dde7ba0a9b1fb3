"""The torch engine in one process: what prepare returns, what a step computes, and what it refuses."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polyaccel import Accelerator
from polyaccel.errors import CheckpointError, LaunchError, PlanError, PrepareError, UnsupportedError
from polyaccel.launch.rendezvous import Rendezvous
from polyaccel.protocols import Shard
from polyaccel_torch.backend import TorchBackend
from polyaccel_torch.dialect.modules import add_autocast
from polyaccel_torch.dialect.optimizers import PreparedOptimizer, use_fused_kernels
from polyaccel_torch.parallel import join

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def mean_squared_error(model: nn.Module, batch) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def accelerator(**options) -> Accelerator:
    torch.set_num_threads(1)
    return Accelerator(backend="torch", cpu=True, **options)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# -- models ------------------------------------------------------------------------------------------------------------


def test_in_one_process_the_prepared_model_is_the_users_own():
    model = network()
    prepared = accelerator().prepare(model)
    assert prepared is model
    assert "forward" not in vars(prepared)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_computes_in_half_and_returns_float32(precision, dtype):
    model = network()
    inside = []
    model[0].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    engine = accelerator(mixed_precision=precision)
    prepared = engine.prepare(model)
    assert prepared(X).dtype == torch.float32
    assert inside == [dtype]
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    assert engine.unwrap_model(prepared).forward.__func__ is nn.Sequential.forward


def test_half_precision_outputs_are_cast_in_any_nesting():
    Pair = collections.namedtuple("Pair", "first second")

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        extra: dict

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            y = self.layer(x)
            return Output(y, {"pair": Pair(y, [y, "text", y.argmax(-1)])})

    output = accelerator(mixed_precision="bf16").prepare(Nested())(X)
    pair = output.extra["pair"]
    assert isinstance(output, Output)
    assert isinstance(pair, Pair)
    assert [output.logits.dtype, pair.first.dtype, pair.second[0].dtype] == [torch.float32] * 3
    assert pair.second[1] == "text"
    assert pair.second[2].dtype == torch.int64


def test_an_error_in_forward_leaves_autocast():
    model = network()
    prepared = accelerator(mixed_precision="bf16").prepare(model)
    with pytest.raises(RuntimeError, match="shapes"):
        prepared(torch.ones(1, 3))
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_prepared_for_another_precision_has_that_one_only():
    model = network()
    accelerator(mixed_precision="bf16").prepare(model)
    assert accelerator().prepare(model)[0](X).dtype == torch.float32
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model(X)
    assert seen == [torch.float32]


def test_a_model_under_autocast_can_be_copied_and_pickled():
    model = accelerator(mixed_precision="bf16").prepare(network())
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)


def test_preparing_a_model_again_gives_the_same_object():
    engine = accelerator()._engine
    engine_with_compile = accelerator(compile=True, compile_backend="eager")._engine
    for each in (engine, engine_with_compile):
        model = network()
        handle = each.prepare_model(model)
        assert each.prepare_model(model) is handle
        assert each.prepare_model(handle) is handle
        assert each.unwrap(handle) is model


def test_a_model_that_user_code_drops_is_freed():
    import gc
    import weakref

    engine = accelerator(compile=True, compile_backend="eager")._engine
    model = network()
    engine.prepare_model(model)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_model_computes_the_same(precision):
    batch = (X, Y)
    losses = {}
    for is_compiled in (False, True):
        run = accelerator(compile=is_compiled, compile_backend="aot_eager", mixed_precision=precision)
        model = network()
        prepared, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        step = run.train_step(mean_squared_error, prepared, optimizer)
        losses[is_compiled] = [step(batch).item() for _ in range(3)]
        assert run.unwrap_model(prepared) is model
        assert (prepared is model) != is_compiled
    # aot_eager runs the same kernels on another graph: equal up to the order of a few sums.
    assert losses[True] == pytest.approx(losses[False], rel=1e-6 if precision == "no" else 1e-2)


def test_a_model_without_values_is_refused_by_parameter_name():
    with torch.device("meta"):
        model = network()
    with pytest.raises(PrepareError, match=r"Sequential\.0\.weight is on the meta device"):
        accelerator().prepare(model)


def test_float16_parameters_cannot_be_trained_with_a_scaled_loss():
    with pytest.raises(PrepareError, match=r"0\.weight is float16"):
        accelerator(mixed_precision="fp16").prepare(network().half())


# -- the step ----------------------------------------------------------------------------------------------------------


def hand_written(optimizer_class, steps: int = 4, **options) -> tuple[list[float], list[torch.Tensor]]:
    model = network()
    optimizer = optimizer_class(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        loss = mean_squared_error(model, (X, Y))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weights(model)


@pytest.mark.parametrize("form", ["value", "function", "train_step"])
def test_every_form_of_a_step_equals_the_hand_written_loop_bit_for_bit(form):
    run = accelerator()
    model = network()
    # fused=False: the hand-written loop's own kernels; the next test is about the others
    model, optimizer = run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=False))
    step = run.train_step(mean_squared_error, model, optimizer, max_grad_norm=0.5)
    losses = []
    for _ in range(4):
        if form == "train_step":
            losses.append(step((X, Y)).item())
            continue
        if form == "value":
            loss = mean_squared_error(model, (X, Y))
            run.backward(loss)
        else:
            loss = run.backward(mean_squared_error, model, (X, Y))
        run.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected_losses, expected_weights = hand_written(torch.optim.AdamW, lr=0.01, fused=False)
    assert losses == expected_losses
    assert all(map(torch.equal, weights(model), expected_weights))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_kernels_are_used_where_torch_has_them_and_agree_within_rounding(name):
    kind = getattr(torch.optim, name)
    run = accelerator()
    model = network()
    model, optimizer = run.prepare(model, kind(model.parameters(), lr=0.01))
    assert optimizer.param_groups[0]["fused"] is True
    step = run.train_step(mean_squared_error, model, optimizer, max_grad_norm=0.5)
    losses = [step((X, Y)).item() for _ in range(4)]
    expected_losses, expected_weights = hand_written(kind, lr=0.01, fused=False)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    for ours, theirs in zip(weights(model), expected_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # one rounding per operation, four steps


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": False}, {"differentiable": True}], ids=str
)
def test_a_users_choice_of_kernels_is_kept(options):
    optimizer = torch.optim.AdamW(network().parameters(), **options)
    before = dict(optimizer.param_groups[0])
    assert not use_fused_kernels(optimizer, [])
    assert dict(optimizer.param_groups[0]) == before


def test_sparse_gradients_and_subclasses_keep_their_own_kernels():
    class Mine(torch.optim.SGD):
        """May override step."""

    model = nn.Embedding(5, 2, sparse=True)
    assert not use_fused_kernels(torch.optim.SGD(model.parameters(), lr=0.1), [model])
    assert not use_fused_kernels(Mine(network().parameters(), lr=0.1), [])
    assert not use_fused_kernels(torch.optim.RMSprop(network().parameters()), [])


def test_four_micro_batches_equal_one_batch():
    run = accelerator(gradient_accumulation_steps=4)
    model = network()
    model, optimizer, loader = run.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(X, Y), batch_size=4)
    )
    for batch in loader:
        with run.accumulate(model):
            run.backward(mean_squared_error(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            assert all((p.grad is None) == run.sync_gradients for p in model.parameters())
    whole = network()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    mean_squared_error(whole, (X, Y)).backward()
    optimizer.step()
    for ours, theirs in zip(weights(model), weights(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # four partial sums instead of one


def test_a_step_adds_few_python_calls_to_the_hand_written_one():
    """Counted, not timed: every call costs 50 to 100 ns, and a forgotten inspect.signature or find_spec costs hundreds of calls."""

    def calls(step) -> int:
        step(), step()  # caches and lazily made state
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            step()
        finally:
            sys.setprofile(None)
        return count

    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, fused=False)

    def by_hand() -> None:
        mean_squared_error(model, (X, Y)).backward()
        plain.step()
        plain.zero_grad()

    run = accelerator()
    prepared = network()
    prepared, optimizer = run.prepare(prepared, torch.optim.SGD(prepared.parameters(), lr=0.1, fused=False))

    def by_us() -> None:
        run.backward(mean_squared_error(prepared, (X, Y)))
        optimizer.step()
        optimizer.zero_grad()

    assert calls(by_us) - calls(by_hand) <= 16


# -- what a loss function returns --------------------------------------------------------------------------------------


def test_auxiliary_values_are_detached_tensors():
    def loss_fn(model, batch):
        output = model(batch[0])
        loss = nn.functional.mse_loss(output, batch[1])
        return loss, {"output": output, "correct": (output > 0).sum(), "seen": 16, "rate": 0.5, "note": "kept"}

    run = accelerator()
    model = network()
    model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    result = run.train_step(loss_fn, model, optimizer)((X, Y))
    assert set(result) == {"loss", "output", "correct", "seen", "rate", "note"}
    assert not result["loss"].requires_grad
    assert not result["output"].requires_grad
    assert result["output"].shape == (16, 2)
    assert (result["seen"].item(), result["rate"].item(), result["note"]) == (16, 0.5, "kept")


@pytest.mark.parametrize("loss", [1.5, np.float32(1.5)], ids=["float", "numpy"])
def test_a_loss_that_is_no_tensor_is_refused_by_its_type(loss):
    with pytest.raises(PrepareError, match=type(loss).__name__):
        accelerator().backward(loss)


def test_a_loss_without_a_graph_is_refused_with_the_usual_causes():
    run = accelerator()
    model = run.prepare(network())
    with torch.no_grad():
        loss = mean_squared_error(model, (X, Y))
    with pytest.raises(PrepareError, match="depends on no parameter") as caught:
        run.backward(loss)
    assert "no_grad" in caught.value.hint


def test_an_optimizer_of_another_model_is_refused_before_anything_changes():
    run = accelerator()
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(PrepareError, match=r"SGD\.param_groups\[0\]\['params'\]\[0\], of shape \(8, 4\)"):
        run.prepare(network(), optimizer)
    assert optimizer.param_groups[0]["fused"] is None


# -- the optimizer that user code holds --------------------------------------------------------------------------------


def test_the_prepared_optimizer_is_a_torch_optimizer_that_shares_everything():
    run = accelerator()
    model = network()
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = run.prepare(model, plain)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is plain
    assert optimizer.param_groups is plain.param_groups
    assert optimizer.state is plain.state
    assert optimizer.defaults is plain.defaults
    optimizer.param_groups[0]["lr"] = 0.5
    assert plain.param_groups[0]["lr"] == 0.5
    run.backward(mean_squared_error(model, (X, Y)))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) == 4
    optimizer.train(), optimizer.eval()


def test_hooks_and_attributes_of_the_users_optimizer_work_through_the_prepared_one():
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    plain.label = "mine"
    optimizer = accelerator().prepare(model, plain)[1]
    ran = []
    optimizer.register_step_post_hook(lambda *args: ran.append(args[0]))
    optimizer.step()
    assert ran == [plain]
    assert optimizer.label == "mine"
    with pytest.raises(AttributeError, match="no_such"):
        _ = optimizer.no_such


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_the_prepared_optimizer_can_be_copied(copied):
    model = network()
    optimizer = accelerator().prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))[1]
    again = copied(optimizer)
    assert isinstance(again, PreparedOptimizer)
    assert again.param_groups[0]["lr"] == 0.3
    again.step()
    again.zero_grad()


def test_a_closure_is_passed_on():
    model = network()
    model, optimizer = accelerator().prepare(model, torch.optim.LBFGS(model.parameters(), max_iter=2))

    def closure():
        optimizer.zero_grad()
        loss = mean_squared_error(model, (X, Y))
        loss.backward()
        return loss

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < first


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_schedulers_follow_without_a_warning(when):
    run = accelerator()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if when == "before prepare":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        model, optimizer, scheduler = run.prepare(model, optimizer, scheduler)
    else:
        model, optimizer = run.prepare(model, optimizer)
        scheduler = run.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    for _ in range(2):
        run.backward(mean_squared_error(model, (X, Y)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr"] == 0.25


# -- fp16 --------------------------------------------------------------------------------------------------------------


def fp16(scale: float = 2.0**16, **options):
    run = accelerator(mixed_precision="fp16", **options)
    run._engine._scaler.scaler._init_scale = scale
    return run


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_skips_the_step_and_halves_the_scale(fused):
    run = fp16(1024.0)
    model = network()
    model, optimizer = run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused))
    scaler = run._engine._scaler.scaler
    before = weights(model)
    run.backward(mean_squared_error(model, (X, Y)))
    model[0].weight.grad[0, 0] = float("inf")
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.step_was_skipped
    assert run.optimizer_step_was_skipped
    assert all(map(torch.equal, weights(model), before))
    run.backward(mean_squared_error(model, (X, Y)))
    assert scaler.get_scale() == 512.0
    optimizer.step()
    assert not optimizer.step_was_skipped
    assert not torch.equal(weights(model)[0], before[0])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_scaled_gradients_give_the_update_of_plain_ones(fused, clip):
    results = {}
    for precision in ("no", "fp16"):
        run = fp16(256.0) if precision == "fp16" else accelerator()
        model = network()
        model, optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused))
        norms = []
        for _ in range(3):
            run.backward(mean_squared_error(model, (X, Y)))
            if clip:
                norms.append(run.clip_grad_norm_(model.parameters(), 0.1).item())
                run.clip_grad_value_(model.parameters(), 0.05)  # a second clip must not unscale again
            optimizer.step()
            optimizer.zero_grad()
        results[precision] = norms, weights(model)
    assert results["fp16"][0] == pytest.approx(results["no"][0], rel=2e-2)
    for ours, theirs in zip(results["fp16"][1], results["no"][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # float16 keeps 11 bits


def test_two_optimizers_that_share_a_backward_use_one_scale():
    run = fp16(1024.0)
    first, second = network(), network()
    first, second, one, two = run.prepare(
        first,
        second,
        torch.optim.SGD(first.parameters(), lr=0.1),
        torch.optim.SGD(second.parameters(), lr=0.1),
    )
    run.backward(mean_squared_error(first, (X, Y)) + mean_squared_error(second, (X, Y)))
    first[0].weight.grad[0, 0] = float("inf")
    one.step()  # overflow: the scale will be halved, but only after the second optimizer has used its gradients
    two.step()
    assert one.step_was_skipped
    assert not two.step_was_skipped
    reference = network()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    mean_squared_error(reference, (X, Y)).backward()
    optimizer.step()
    for ours, theirs in zip(weights(second), weights(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_a_closure_is_refused_under_a_loss_scale():
    run = fp16()
    model = network()
    optimizer = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[1]
    with pytest.raises(UnsupportedError, match=r"SGD\.step\(closure\)"):
        optimizer.step(lambda: 0.0)


# -- loaders -----------------------------------------------------------------------------------------------------------


def test_a_short_last_batch_stays_short_in_one_process():
    run = accelerator()
    loader = run.prepare(DataLoader(TensorDataset(X), batch_size=6))
    assert [len(batch[0]) for batch in loader] == [6, 6, 4]


def test_any_iterable_of_batches_can_be_prepared_as_a_loader():
    batches = [{"x": np.full((2,), i, np.float32)} for i in range(3)]
    loader = accelerator().prepare_data_loader(batches)
    assert len(loader) == 3
    assert [(batch["x"].tolist(), loader.end_of_dataloader) for batch in loader] == [
        ([0.0, 0.0], False),
        ([1.0, 1.0], False),
        ([2.0, 2.0], True),
    ]


def test_a_prepared_loader_is_refused_the_second_time():
    run = accelerator()
    loader = run.prepare(DataLoader(TensorDataset(X), batch_size=6))
    with pytest.raises(PrepareError, match="already prepared"):
        run.prepare(loader)
    with pytest.raises(PrepareError, match="prepared already"):
        run._engine.prepare_loader(loader, run._loader_spec())


# -- state -------------------------------------------------------------------------------------------------------------


def test_model_and_optimizer_state_continue_a_run_bit_for_bit():
    def prepared(run):
        model = network()
        return run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))

    def train(run, model, optimizer, steps):
        step = run.train_step(mean_squared_error, model, optimizer)
        return [step((X, Y)).item() for _ in range(steps)]

    run = accelerator()
    model, optimizer = prepared(run)
    train(run, model, optimizer, 3)
    saved_model = list(run._engine.read_state(model))
    saved_optimizer = list(run._engine.read_state(optimizer))
    expected = train(run, model, optimizer, 3)
    assert {shard.name for shard in saved_model} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {shard.name for shard in saved_optimizer} >= {"0.weight.exp_avg", "2.bias.exp_avg_sq", "0.bias.step"}
    assert all(shard.data.dtype == np.float32 for shard in saved_model)

    fresh = accelerator()
    model, optimizer = prepared(fresh)
    fresh._engine.write_state(model, saved_model)
    fresh._engine.write_state(optimizer, saved_optimizer)
    assert train(fresh, model, optimizer, 3) == expected


def test_state_is_put_together_from_pieces_of_any_mesh():
    engine = accelerator()._engine
    model = nn.Linear(2, 4, bias=False)
    whole = np.arange(8, dtype=np.float32).reshape(4, 2)
    pieces = [Shard("weight", (4, 2), (start, 0), "float32", whole[start : start + 2]) for start in (2, 0)]
    engine.write_state(engine.prepare_model(model), pieces)
    assert model.weight.tolist() == whole.tolist()
    with pytest.raises(CheckpointError, match="4 of 8 elements"):
        engine.write_state(model, pieces[:1])


def test_bfloat16_and_tied_parameters_survive():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, dtype=torch.bfloat16)
            self.b = nn.Linear(2, 2, dtype=torch.bfloat16)
            self.b.weight = self.a.weight

    engine = accelerator()._engine
    model, other = Tied(), Tied()
    shards = list(engine.read_state(engine.prepare_model(model)))
    assert [shard.name for shard in shards] == ["a.weight", "a.bias", "b.bias"]
    assert {shard.dtype for shard in shards} == {"bfloat16"}
    engine.write_state(engine.prepare_model(other), shards)
    assert torch.equal(other.a.weight, model.a.weight)
    assert other.b.weight is other.a.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: shards[1:], "missing: 0.weight"),
        (lambda shards: [*shards, Shard("extra", (1,), (0,), "float32", np.zeros(1, np.float32))], "unknown: extra"),
        (
            lambda shards: [Shard("0.weight", (2,), (0,), "float32", np.zeros(2, np.float32)), *shards[1:]],
            r"\(2,\) in the checkpoint and \(8, 4\) in the model",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    engine = accelerator()._engine
    model = engine.prepare_model(network())
    before = weights(model)
    with pytest.raises(CheckpointError, match=message):
        engine.write_state(model, change(list(engine.read_state(model))))
    assert all(map(torch.equal, weights(model), before))


# -- before anything is opened -----------------------------------------------------------------------------------------


def test_the_backend_declares_itself_without_torch():
    probe = TorchBackend().probe()
    assert probe.is_usable
    assert probe.is_loaded
    assert probe.version == torch.__version__.split("+")[0] or probe.version == torch.__version__


def test_one_worker_per_gpu_and_as_many_as_asked_for_on_cpu(monkeypatch):
    backend = TorchBackend()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert len(backend.worker_slots(None, use_cpu=False)) == 2
    assert len(backend.worker_slots(1, use_cpu=False)) == 1
    assert len(backend.worker_slots(None, use_cpu=True)) == 1
    assert len(backend.worker_slots(5, use_cpu=True)) == 5
    with pytest.raises(LaunchError, match=r"--num-processes 3 .* 2"):
        backend.worker_slots(3, use_cpu=False)


def test_more_processes_than_gpus_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlanError, match=r"3 processes .* torch sees 2"):
        join(Rendezvous(0, 3, 0, 3, "127.0.0.1", 1), use_cpu=False)


@pytest.mark.parametrize("index", [0, 1])
def test_a_job_that_cannot_be_joined_names_the_address(index):
    place = Rendezvous(index, 2, index, 2, "127.0.0.1", 29517)
    with pytest.raises(LaunchError, match=r"process \d of 2 could not join the job at 127\.0\.0\.1:29517 within 1 s"):
        join(place, use_cpu=True, timeout=timedelta(seconds=1))


def test_autocast_is_available_outside_the_model():
    run = accelerator(mixed_precision="bf16")
    with run.autocast():
        assert (X @ X.T).dtype == torch.bfloat16
    assert (X @ X.T).dtype == torch.float32


def test_autocast_hooks_are_exchanged_not_stacked():
    model = network()
    for _ in range(3):
        add_autocast(model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
