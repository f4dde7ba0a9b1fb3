"""What a forward may do with autograd: switches, writes, hooks, custom functions, recomputation, transforms, input gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bridge_scripts import on_jax
from semantics import assert_trains_as_torch, mean_square
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from polyaccel.errors import UnsupportedError
from polyaccel_bridges.capture import capture_vjp
from polyaccel_bridges.graphs import TensorSpec

torch.set_num_threads(1)


def rows(num: int = 3, size: int = 8, width: int = 4) -> list[torch.Tensor]:
    return [torch.randn(size, width) for _ in range(num)]


class Block(nn.Module):
    """Two linear layers around what a subclass does in the middle."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def middle(self, h):
        return h

    def forward(self, x):
        return self.second(self.middle(torch.tanh(self.first(x))))


class StopsGradients(Block):
    def middle(self, h):
        with torch.no_grad():
            scale = self.second.weight.norm() + h.mean()
        with torch.no_grad(), torch.enable_grad():
            again = h * 2
        return h * scale + again.detach() + self.first(torch.ones(4)).detach() * again


class WritesInPlace(Block):
    def middle(self, h):
        h = h * 1.0
        h[:, 0] = h[:, 1] * 2
        h[0].mul_(2)
        h.view(-1)[5:9] += 1
        h.t()[2].add_(1)
        h.narrow(0, 0, 4).add_(h.narrow(0, 4, 4).clone())
        F.relu_(h[:, 3:])
        out = torch.zeros_like(h)
        out.index_add_(0, torch.arange(len(h)).flip(0), h)
        out.masked_fill_(h > 2, 0.5)
        return out.requires_grad_() + h.as_strided(h.shape, h.stride())


class Straight(torch.autograd.Function):
    """Rounds, and passes three times the gradient."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.factor * x.cos(), None


class Two(torch.autograd.Function):
    """The form with setup_context, two outputs, one of them without a gradient."""

    @staticmethod
    def forward(x):
        return x.exp(), x.argmax(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        return grad * ctx.saved_tensors[0] * 0.5


class WithFunctions(Block):
    def middle(self, h):
        a, index = Two.apply(h)
        return Straight.apply(h, 3.0) + a + F.one_hot(index, 6)


class Transforms(Block):
    """torch.func inside forward: a Jacobian, per-sample gradients, a forward derivative, another set of parameters."""

    def middle(self, h):
        def energy(row):
            return (row**3).sum()

        per_sample = torch.func.vmap(torch.func.grad(energy))(h)
        _, along = torch.func.jvp(torch.sin, (h,), (torch.ones_like(h),))
        jacobian = torch.func.jacrev(lambda row: row.cumsum(0) * row)(h[0])
        return per_sample + along + h @ jacobian

    def forward(self, x):
        half = {name: value * 0.5 for name, value in self.first.named_parameters()}
        return super().forward(x) + self.second(torch.func.functional_call(self.first, half, (x,)))


class Casts(Block):
    """Regions of another precision inside forward."""

    def middle(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.second(h)
            assert low.dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                exact = self.second(h)
                assert exact.dtype == torch.float32
        return h * (low.float().sum() * 0.1 + exact.sum())


class NeedsInputGradient(Block):
    """A force: the derivative of an energy by the inputs is the output (as in models of molecules)."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = super().forward(x).pow(2).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
@pytest.mark.parametrize(
    "make", [StopsGradients, WritesInPlace, WithFunctions, Transforms, NeedsInputGradient], ids=lambda m: m.__name__
)
def test_forward_may(make):
    assert_trains_as_torch(make, rows, forms=("loop", "function"), atol=1e-5)


def test_autocast_regions_inside_forward_are_followed():
    # bfloat16 keeps 8 bits: sums in another order differ by one rounding of it.
    assert_trains_as_torch(Casts, rows, atol=2e-3, rtol=2e-2)


# -- hooks -------------------------------------------------------------------------------------------------------------------


def hooked() -> nn.Module:
    model = Block()
    model.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.first.register_forward_hook(lambda module, args, out: out + args[0].mean())
    model.second.register_forward_hook(lambda module, args, kwargs, out: out * 0.5, with_kwargs=True)
    return model


def hooked_backward() -> nn.Module:
    model = Block()
    model.second.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))
    model.second.register_full_backward_pre_hook(lambda module, grad_out: (grad_out[0].clamp(-0.01, 0.01),))
    return model


class HooksItsTensors(Block):
    def middle(self, h):
        h.register_hook(lambda grad: grad * 3)
        return h


@pytest.mark.parametrize("make", [hooked, hooked_backward, HooksItsTensors], ids=lambda m: m.__name__)
def test_hooks_are_part_of_the_program(make):
    assert_trains_as_torch(make, rows)


def test_a_hook_that_comes_or_goes_between_steps_counts_from_then_on():
    def change(model, step):
        if step == 1:
            model.handle = model.first.register_forward_hook(lambda module, args, out: out * 2)
        if step == 2:
            model.handle.remove()

    assert_trains_as_torch(Block, rows, before_step=change)


# -- recomputation -----------------------------------------------------------------------------------------------------------


class Recomputes(nn.Module):
    use_reentrant = False

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=self.use_reentrant)
        return self.last(h)


class RecomputesReentrant(Recomputes):
    use_reentrant = True


class RecomputesInSegments(Recomputes):
    def forward(self, x):
        return self.last(checkpoint_sequential(self.blocks, 2, self.first(x), use_reentrant=False))


@pytest.mark.parametrize("make", [Recomputes, RecomputesReentrant, RecomputesInSegments], ids=lambda m: m.__name__)
def test_checkpointed_blocks_train(make):
    assert_trains_as_torch(make, rows, forms=("loop", "fused"))


# -- gradients of inputs -----------------------------------------------------------------------------------------------------


def gradient_penalty(model, x):
    points = x.clone().requires_grad_()
    score = model(points).sum(-1)
    (slope,) = torch.autograd.grad(score.sum(), points, create_graph=True)
    return score.mean() + 10 * ((slope.norm(2, dim=1) - 1) ** 2).mean()


def test_a_gradient_penalty_inside_a_loss_function():
    assert_trains_as_torch(Block, rows, gradient_penalty, forms=("function", "fused"), atol=1e-5)


def test_second_derivatives_by_parameters_inside_a_loss_function():
    def sharpness(model, x):
        loss = mean_square(model, x)
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + 0.1 * sum(g.pow(2).sum() for g in grads)

    assert_trains_as_torch(Block, rows, sharpness, forms=("function",), atol=1e-5)


def test_a_checkpointed_forward_keeps_less_for_its_backward():
    def kept_bytes(is_checkpointed: bool) -> int:
        model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4)])

        def forward(x):
            for block in model:
                x = checkpoint(block, x, use_reentrant=False) if is_checkpointed else block(x)
            return [x]

        graph = capture_vjp(forward, {"model": model}, [TensorSpec((64, 8), torch.float32)], autocast=None)
        num_inputs = graph.forward.num_inputs
        outputs = zip(graph.forward.outputs[1:], graph.forward.output_specs[1:], strict=True)
        made = {slot.index: spec for slot, spec in outputs if slot.index >= num_inputs}
        return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in made.values())

    assert kept_bytes(True) < 0.2 * kept_bytes(False)


# -- what the unmodified loop does not follow --------------------------------------------------------------------------------


def test_second_gradients_in_the_loop_are_refused_with_the_form_that_has_them():
    model = on_jax().prepare(Block())
    with pytest.raises(UnsupportedError, match="inside a loss function"):
        torch.autograd.grad(model(torch.randn(2, 4)).sum(), list(model.parameters()), create_graph=True)


def test_a_custom_function_on_an_output_has_its_own_gradient_in_the_loop():
    def straight_through(model, x):
        return Straight.apply(model(x), 3.0).pow(2).mean()

    assert_trains_as_torch(Block, rows, straight_through, forms=("loop", "function"))
