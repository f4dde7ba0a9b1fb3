"""Attention of queries in parts to all keys and values, by the CPU's kernel, forward and backward.

A causal one is computed from the keys before and from those beside this process's queries, which the kernel can do without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from polyaccel_torch.sharded.layouts import laid_out, local_as, mesh_of, reduced, whole

_ROWS = 2  # the queries' dim in (batch, heads, length, dim), and in the sums (batch, heads, length)


class _Layout:
    """How one attention lies on its mesh: heads and batch in pieces, or rows of queries, or everything whole."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.mesh = mesh_of(given)
        query, key = given["query"], given["key"]
        self.is_causal: bool = given["is_causal"]
        self.queries: list[Placement] = whole(self.mesh)
        self.first_row, self.num_rows = 0, int(query.shape[_ROWS])
        self.is_cut = False
        taken: set[int] = set()
        for axis, place in enumerate(query.placements if isinstance(query, DTensor) else ()):
            if type(place) is not Shard or place.dim in taken or place.dim > _ROWS:
                continue
            size = self.mesh.size(axis)
            if query.shape[place.dim] % size:
                continue
            if place.dim == _ROWS:
                if self.is_causal and query.shape[_ROWS] != key.shape[_ROWS]:
                    continue
                self.num_rows //= size
                self.first_row = self.mesh.get_local_rank(axis) * self.num_rows
                self.is_cut = True
            elif key.shape[place.dim] % size:
                continue
            self.queries[axis] = place
            taken.add(place.dim)
        self.keys = [Replicate() if place == Shard(_ROWS) else place for place in self.queries]

    def mask(self, mask: Any) -> Any:
        """This process's piece: cut as the queries are where it has that dim; whole where it is broadcast along it."""
        if mask is None:
            return None
        missing = 4 - mask.dim()
        places: list[Placement] = []
        for place in self.queries:
            dim = place.dim - missing if isinstance(place, Shard) else -1
            places.append(Shard(dim) if dim >= 0 and mask.shape[dim] > 1 else Replicate())
        return local_as(mask, self.mesh, places)

    def segments(self) -> Iterator[tuple[slice, bool]]:
        """Which keys these queries see, and whether the kernel has to look at their order."""
        if not (self.is_causal and self.is_cut):
            yield slice(None), self.is_causal
            return
        if self.first_row:
            yield slice(0, self.first_row), False
        yield slice(self.first_row, self.first_row + self.num_rows), True


def attention(op: Any, given: dict[str, Any]) -> Any:
    """(result, sums) of the operator `op` for its arguments by name, which are DTensors; both lie as the queries do."""
    layout = _Layout(given)
    mesh = layout.mesh
    query = local_as(given["query"], mesh, layout.queries)
    key, value = (local_as(given[name], mesh, layout.keys) for name in ("key", "value"))
    options = {"attn_mask": layout.mask(given["attn_mask"]), "scale": given["scale"]}
    out: Any = None
    for seen, is_causal in layout.segments():
        more = op(query, key[:, :, seen], value[:, :, seen], given["dropout_p"], is_causal, **options)
        out = more if out is None else _joined(out, more)
    return tuple(laid_out(local, mesh, layout.queries) for local in out)


def _joined(first: Any, second: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from that over each of them; sums are logarithms of those of exponents."""
    (one, sum_one), (other, sum_other) = first, second
    total = torch.logaddexp(sum_one, sum_other)
    share_one, share_other = ((part - total).exp().unsqueeze(-1) for part in (sum_one, sum_other))
    return (one * share_one + other * share_other).to(one.dtype), total


def attention_backward(op: Any, given: dict[str, Any]) -> Any:
    """By the kernel, segment by segment: with the sums over all keys it gives each segment's share of every gradient."""
    layout = _Layout(given)
    mesh = layout.mesh
    grad, query, out, sums = (
        local_as(given[name], mesh, layout.queries) for name in ("grad_out", "query", "out", "logsumexp")
    )
    key, value = (local_as(given[name], mesh, layout.keys) for name in ("key", "value"))
    options = {"attn_mask": layout.mask(given["attn_mask"]), "scale": given["scale"]}
    grads: Any = None
    for seen, is_causal in layout.segments():
        some = (key[:, :, seen], value[:, :, seen])
        found = op(grad, query, *some, out, sums, given["dropout_p"], is_causal, **options)
        if grads is None:
            grads = [torch.zeros_like(found[0]), torch.zeros_like(key), torch.zeros_like(value)]
        grads[0] += found[0]
        grads[1][:, :, seen] += found[1]
        grads[2][:, :, seen] += found[2]
    summands = [Partial() if place == Shard(_ROWS) else place for place in layout.queries]
    pieces = [laid_out(grads[0], mesh, layout.queries)]
    for name, local in zip(("key", "value"), grads[1:], strict=True):
        found = laid_out(local, mesh, summands)
        pieces.append(found.redistribute(placements=reduced(given[name], mesh)))
    return tuple(pieces)
