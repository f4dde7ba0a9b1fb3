"""The optimizer that user code holds after prepare: a torch optimizer, fused where torch can, scaled under fp16."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch_network import X, Y, accelerator, hand_written, mean_squared_error, network, weights

from polyaccel.errors import UnsupportedError
from polyaccel_torch.dialect.optimizers import PreparedOptimizer, use_fused_kernels


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
