"""Reads the exchanges between devices out of a compiled program's text: what, how often, how large, among how many."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyaccel.planned.report import Collective, merged

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_STARTED = {f"{kind}-start": kind for kind in _KINDS}
_BYTES = {"pred": 1, "token": 0, "opaque": 0}  # others say their bits
_BITS = re.compile(r"[a-z]+(\d+)")

# `ENTRY %main (...) -> type {`, `%body.1 (...) -> type {`
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED_GROUPS = re.compile(r"\breplica_groups=\{(?:\{([\d,]*)\})?")
_IOTA_GROUPS = re.compile(r"\breplica_groups=\[(\d+),(\d+)\]<=")
_CHAIN = re.compile(r'\bchain_id="(\w+)"')
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_REPLICAS = re.compile(r"\breplica_count=(\d+)")


@dataclass(frozen=True, slots=True)
class _Exchange:
    kind: str
    group_size: int
    result_bytes: int
    chain: str | None = (
        None  # of an exchange that the TPU compiler runs in steps beside others: the same in its start, steps and end
    )


@dataclass(slots=True)
class _Computation:
    exchanges: list[_Exchange]
    calls: list[tuple[str, int]]  # name, and how often one run of this computation runs it


def collectives_of(text: str) -> tuple[Collective, ...]:
    """The collectives that one run of an optimized program (`compiled.as_text()`) makes on each device.

    In a loop they count as often as it runs, where the compiler knows that, else once; of a conditional every branch counts.
    """
    head = text.partition("\n")[0]
    num_devices = _number(_PARTITIONS, head) * _number(_REPLICAS, head)
    computations, entry = _computations(text, num_devices)
    found: list[Collective] = []
    chains: set[str] = set()
    for name, times in _runs(computations, entry).items():
        # A fusion of the TPU compiler holds the sum and the slice that together are a reduce-scatter.
        is_scatter = name.startswith("all-reduce-scatter")
        for exchange in computations[name].exchanges:
            if exchange.chain in chains:
                continue
            if exchange.chain is not None:
                chains.add(exchange.chain)
            found.append(_collective(exchange, times, is_scatter=is_scatter))
    return merged([one for one in found if one.group_size > 1])


def _collective(exchange: _Exchange, times: int, *, is_scatter: bool) -> Collective:
    kind, num, size = exchange.kind, exchange.group_size, exchange.result_bytes
    if kind == "all-reduce" and is_scatter:
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        size *= num  # its result is one part
    others = (num - 1) / num
    sent = {"all-reduce": 2 * others, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(kind, others) * size
    return Collective(kind, num, times, size * times, round(sent * times))


def _number(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else 1


def _computations(text: str, num_devices: int) -> tuple[Mapping[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = computations[start[2]] = _Computation([], [])
            entry = start[2] if start[1] else entry
            continue
        instruction = _INSTRUCTION.match(line) if current is not None else None
        if instruction is None or current is None:
            continue
        opcode = _OPCODE.search(" " + instruction[2])
        if opcode is None:
            continue
        kind = opcode[1]
        result = instruction[2][: opcode.start()]
        if kind in _KINDS or kind in _STARTED:
            current.exchanges.append(_exchange(kind, result, line, num_devices))
            continue  # what it applies is arithmetic
        times = _number(_TRIPS, line) if kind == "while" else 1
        current.calls += [(name, times) for name in _called(line)]
    return computations, entry


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _exchange(kind: str, result: str, line: str, num_devices: int) -> _Exchange:
    sizes = [_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(result)]
    started = _STARTED.get(kind)
    if started is not None:
        kind = started
        if kind in ("all-gather", "collective-permute") and len(sizes) > 1:
            # (operands, results, contexts): operands and results in equal numbers, contexts are words of four bytes.
            arrays = sizes if result.count("u32[]") == 0 else [s for s in sizes if s != 4]
            arrays = arrays or sizes
            sizes = arrays[len(arrays) // 2 :]
    chain = _CHAIN.search(line)
    return _Exchange(kind, _group_size(kind, line, num_devices), sum(sizes), chain[1] if chain else None)


def _bytes(dtype: str, dims: str) -> int:
    known = _BYTES.get(dtype)
    bits = _BITS.match(dtype)
    each = 8 * known if known is not None else int(bits[1]) if bits else 0
    count = math.prod(int(size.lstrip("<=")) for size in dims.split(",") if size)
    return (count * each + 7) // 8


def _group_size(kind: str, line: str, num_devices: int) -> int:
    if kind == "collective-permute":
        return num_devices if "source_target_pairs={{" in line else 1
    iota = _IOTA_GROUPS.search(line)
    if iota:
        return int(iota[2])
    listed = _LISTED_GROUPS.search(line)
    if listed and listed[1]:
        return len(listed[1].split(","))
    return num_devices  # none are named: all of them


def _runs(computations: Mapping[str, _Computation], entry: str) -> dict[str, int]:
    """How often one run of the program runs each of its computations."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        if name not in computations:
            return
        runs[name] = runs.get(name, 0) + times
        for called, each in computations[name].calls:
            visit(called, times * each)

    visit(entry, 1)
    return runs
