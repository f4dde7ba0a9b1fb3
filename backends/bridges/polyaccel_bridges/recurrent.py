"""Recurrent layers as one operation per layer and direction, so that a program's size does not grow with the sequence.

PyTorch's own capture takes nn.LSTM, nn.GRU and nn.RNN apart into one set of operations per time step. Here the products with the
inputs, which do not wait for each other, are ordinary operations over the whole sequence, and the recurrence is
`polyaccel::recurrence`, which `lowerings/recurrent.py` runs with lax.scan; its backward is an operation of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

KINDS = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}  # -> gates per hidden unit

_library = torch.library.Library("polyaccel", "FRAGMENT")
_library.define(
    "recurrence(Tensor projected, Tensor hidden, Tensor cell, Tensor weight, Tensor? bias, str kind, bool reverse)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "recurrence_backward(Tensor grad_hidden, Tensor? grad_cell, Tensor projected, Tensor hidden, Tensor cell, Tensor weight,"
    " Tensor outputs, Tensor cells, Tensor gates, str kind, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def saved_gates(kind: str) -> int:
    """Activated gates per hidden unit that the backward takes: a GRU adds its hidden product, an RNN's output says all."""
    return {"lstm": 4, "gru": 4}.get(kind, 0)


def output_dtype(kind: str, projected: torch.dtype, hidden: torch.dtype) -> torch.dtype:
    """Under autocast the products are narrow; a cell that adds them to its state is as wide as the state."""
    return projected if kind in ("tanh", "relu") else torch.promote_types(projected, hidden)


@torch.library.register_fake("polyaccel::recurrence", lib=_library)
def _recurrence(
    projected: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    time, batch, _ = projected.shape
    size = weight.shape[1]
    dtype = output_dtype(kind, projected.dtype, hidden.dtype)
    gates = saved_gates(kind)
    return (
        projected.new_empty(time, batch, size, dtype=dtype),
        projected.new_empty((time, batch, size) if kind == "lstm" else (0,), dtype=dtype),
        projected.new_empty((time, batch, gates * size) if gates else (0,)),
    )


@torch.library.register_fake("polyaccel::recurrence_backward", lib=_library)
def _recurrence_backward(
    grad_hidden: torch.Tensor,
    grad_cell: torch.Tensor | None,
    projected: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    weight: torch.Tensor,
    outputs: torch.Tensor,
    cells: torch.Tensor,
    gates: torch.Tensor,
    kind: str,
    reverse: bool,
) -> tuple[torch.Tensor, ...]:
    return (
        torch.empty_like(projected),
        torch.empty_like(hidden),
        torch.empty_like(cell),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0]),
    )


class Recurrence(torch.autograd.Function):
    """`outputs, cells = Recurrence.apply(...)`: projected (time, batch, gates x size) -> both (time, batch, size)."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: torch.Tensor,
        hidden: torch.Tensor,
        cell: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kind: str,
        reverse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, cells, gates = torch.ops.polyaccel.recurrence(projected, hidden, cell, weight, bias, kind, reverse)
        ctx.save_for_backward(projected, hidden, cell, weight, bias, outputs, cells, gates)
        ctx.kind, ctx.reverse = kind, reverse
        ctx.set_materialize_grads(False)
        return outputs, cells

    @staticmethod
    def backward(ctx: Any, grad_hidden: Any, grad_cell: Any) -> Any:
        projected, hidden, cell, weight, bias, outputs, cells, gates = ctx.saved_tensors
        if grad_hidden is None:
            grad_hidden = torch.zeros_like(outputs)
        if torch.is_grad_enabled():  # somebody differentiates this backward (create_graph)
            return _backward_step_by_step(ctx, grad_hidden, grad_cell)
        found = torch.ops.polyaccel.recurrence_backward(
            grad_hidden, grad_cell, projected, hidden, cell, weight, outputs, cells, gates, ctx.kind, ctx.reverse
        )
        by_projected, by_hidden, by_cell, by_weight, by_bias = found
        has_cell = ctx.kind == "lstm"
        return (
            by_projected,
            by_hidden,
            by_cell if has_cell else None,
            by_weight,
            None if bias is None else by_bias,
            None,
            None,
        )


def _backward_step_by_step(ctx: Any, grad_hidden: torch.Tensor, grad_cell: torch.Tensor | None) -> tuple[Any, ...]:
    """The same gradients as a graph of ordinary operations, one set per time step: it can be differentiated again."""
    given: list[Any] = list(ctx.saved_tensors[:5])
    projected, hidden, cell, weight, bias = given
    with torch.enable_grad():
        outputs, cells = step_by_step(projected, hidden, cell, weight, bias, ctx.kind, ctx.reverse)
    wanted = [index for index, value in enumerate(given) if value is not None and ctx.needs_input_grad[index]]
    heads = [(outputs, grad_hidden)] + ([] if grad_cell is None else [(cells, grad_cell)])
    found = torch.autograd.grad(
        [head for head, _ in heads],
        [given[index] for index in wanted],
        [grad for _, grad in heads],
        create_graph=True,
        allow_unused=True,
    )
    grads: list[Any] = [None] * 7
    for index, grad in zip(wanted, found, strict=True):
        grads[index] = grad
    return tuple(grads)


def step_by_step(
    projected: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `polyaccel::recurrence` computes, in ordinary operations (torch.nn.LSTM, GRU and RNN give the formulas)."""
    outputs, cells = [], []
    order = range(len(projected))
    for index in reversed(order) if reverse else order:
        product = F.linear(hidden, weight, bias)
        if kind == "lstm":
            i, f, g, o = (projected[index] + product).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        elif kind == "gru":
            (r, z, n), (hr, hz, hn) = projected[index].chunk(3, -1), product.chunk(3, -1)
            n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
            hidden = (hidden - n) * torch.sigmoid(z + hz) + n
        else:
            hidden = getattr(torch, kind)(projected[index] + product)
        outputs.append(hidden)
        cells.append(cell)
    if reverse:
        outputs.reverse()
        cells.reverse()
    return torch.stack(outputs), torch.stack(cells)


# -- torch's own functions -----------------------------------------------------------------------------------------------------


def run_layers(
    kind: str,
    x: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All layers over x (time, batch, features); the last states are (layers x directions, batch, size).

    With `lengths` (batch,) the last states are those of each sequence's own last step, where its other direction starts.
    """
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    last_hidden, last_cell = [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            which = layer * directions + direction
            w_ih, w_hh, *biases = params[each * which : each * (which + 1)]
            b_ih, b_hh = biases if has_biases else (None, None)
            is_turned = lengths is not None and direction == 1
            projected = F.linear(turned(x, lengths) if is_turned else x, w_ih, b_ih)
            hidden, cell = state[0][which], state[1][which]
            weight = w_hh.to(projected.dtype)  # autocast makes the products narrow
            bias = None if b_hh is None else b_hh.to(projected.dtype)
            is_reverse = direction == 1 and not is_turned
            out, cells = Recurrence.apply(projected, hidden, cell, weight, bias, kind, is_reverse)
            outputs.append(turned(out, lengths) if is_turned else out)
            last_hidden.append(_last_step(out, lengths, is_reverse))
            last_cell.append(_last_step(cells, lengths, is_reverse) if kind == "lstm" else cell)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            x = F.dropout(x, dropout, True)
    return x, torch.stack(last_hidden), torch.stack(last_cell)


def turned(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Every sequence of x (time, batch, features) from its own last step to its first; the padding stays where it is."""
    assert lengths is not None
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, order[:, :, None].expand(-1, -1, x.shape[2]))


def _last_step(out: torch.Tensor, lengths: torch.Tensor | None, is_reverse: bool) -> torch.Tensor:
    if lengths is None:
        return out[0 if is_reverse else -1]
    return out.gather(0, (lengths - 1)[None, :, None].expand(-1, -1, out.shape[2]))[0]


def _can_scan(x: Any, arguments: Sequence[Any]) -> bool:
    """Packed sequences have their batch sizes second; functorch and forward derivatives need ordinary operations."""
    is_plain = isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[0] > 0 and len(arguments) == 8
    has_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return is_plain and not has_transform and torch.autograd.forward_ad._current_level < 0


def _lstm(*args: Any, **kwargs: Any) -> Any:
    x, state, params, *rest = args
    if (
        kwargs
        or not _can_scan(x, args[1:])
        or isinstance(state, torch.Tensor)
        or state[0].shape[-1] != params[1].shape[1]
    ):
        return torch.lstm(*args, **kwargs)
    if params[1].shape[1] * 4 != params[1].shape[0]:
        return torch.lstm(*args, **kwargs)  # proj_size: the hidden state is a product of its own
    has_biases, num_layers, dropout, train, bidirectional, batch_first = rest
    x = x.transpose(0, 1) if batch_first else x
    out, hidden, cell = run_layers("lstm", x, state, params, has_biases, num_layers, dropout, train, bidirectional)
    return (out.transpose(0, 1) if batch_first else out), hidden, cell


def _other(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        x, state, params, *rest = args
        if kwargs or not _can_scan(x, args[1:]):
            return original(*args, **kwargs)
        has_biases, num_layers, dropout, train, bidirectional, batch_first = rest
        x = x.transpose(0, 1) if batch_first else x
        states = (state, state)
        out, hidden, _ = run_layers(kind, x, states, params, has_biases, num_layers, dropout, train, bidirectional)
        return (out.transpose(0, 1) if batch_first else out), hidden

    return run


SCANNED: dict[Any, Callable[..., Any]] = {
    torch.lstm: _lstm,
    torch.gru: _other("gru", torch.gru),
    torch.rnn_tanh: _other("tanh", torch.rnn_tanh),
    torch.rnn_relu: _other("relu", torch.rnn_relu),
}
