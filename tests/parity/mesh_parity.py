"""One GPT on every mesh of four devices that an engine declares, through `polyaccel launch`: what one device makes of it must come out.

    python tests/parity/mesh_parity.py --engines torch jax [--forms function loss fused flax] [--output benchmarks/results/mesh_parity.json]
    PJRT_DEVICE=CPU python tests/parity/mesh_parity.py --engines xla        # in the xla environment; --reference: losses to compare with

Forms: how the script says its step (`backward(loss)`, `backward(function, ...)`, `train_step`), and the same model in Flax, on jax alone.
Prints per engine and mesh the largest difference of a loss from torch on one process, and the bytes of one device beside the plan's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("mesh_training.py")
NUM_DEVICES = 4
AXES = ("data", "fsdp", "tensor", "sequence")  # replica counts as data does


def meshes_of(axes: frozenset[str]) -> list[dict[str, int]]:
    """Every way of giving four devices to these axes."""
    known = [axis for axis in AXES if axis in axes]
    sizes = itertools.product((1, 2, 4), repeat=len(known))
    return [
        {axis: size for axis, size in zip(known, row, strict=True) if size > 1}
        for row in sizes
        if _product(row) == NUM_DEVICES
    ]


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def named(mesh: dict[str, int]) -> str:
    """`fsdp 2 x tensor 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device"


def trained(engine: str, mesh: dict[str, int], *, form: str = "function", timeout_s: float = 600) -> dict[str, Any]:
    """What mesh_training.py found on a mesh, launched as a user does: torch in a process per device, the others in one."""
    num_devices = _product(tuple(mesh.values()))
    processes = num_devices if engine == "torch" else 1
    devices = {"jax": "JAX_NUM_CPU_DEVICES", "xla": "CPU_NUM_DEVICES"}.get(engine)
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "CPU_NUM_DEVICES")}
    if devices is not None:
        environment[devices] = str(num_devices)
    command = [sys.executable, "-m", "polyaccel.cli.main", "launch", "--backend", engine]
    command += [] if engine == "xla" else ["--cpu"]  # xla's CPU is chosen by PJRT_DEVICE
    command += ["--num-processes", str(processes)]
    for axis, size in {"data": 1, **mesh}.items():
        command += [f"--mesh.{axis}", str(size)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        done = subprocess.run(
            [*command, str(SCRIPT), str(output), "--form", form],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            raise RuntimeError(
                f"{engine}, {named(mesh)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
            )
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Of one loss, absolute."""
    return max(abs(one - other) for one, other in zip(losses, reference, strict=True))


def declared_axes(engine: str) -> frozenset[str]:
    """What the engine's backend says of itself."""
    from polyaccel.registry import choose_backend

    return choose_backend(engine).capabilities.mesh_axes


def row_of(engine: str, mesh: dict[str, int], form: str, reference: list[float]) -> dict[str, Any]:
    """One line of the table; an error of the run is one too."""
    try:
        found = trained(engine, mesh, form=form)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"engine": engine, "mesh": mesh, "form": form, "error": lines[-1]}
    kept = {name: found[name] for name in ("parameters", "state", "predicted", "whole")}
    return {
        "engine": engine,
        "mesh": mesh,
        "form": form,
        "difference": largest_difference(found["losses"], reference),
        **kept,
    }


def with_row(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file as they are now, which another run may be adding to, with this one in the place of an older one."""
    rows = json.loads(path.read_text()).get("rows", []) if path.exists() else []
    same = {name: row[name] for name in ("engine", "mesh", "form")}.items()
    return [*(one for one in rows if not same <= one.items()), row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engines", nargs="+", choices=["torch", "jax", "xla"], default=["torch", "jax"])
    parser.add_argument("--forms", nargs="+", choices=["loss", "function", "fused", "flax"], default=["function"])
    parser.add_argument("--only", nargs="*", default=[], help="meshes, as they are printed")
    parser.add_argument("--output", help="write the rows to this JSON file, beside those of other engines that it has")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from interleaved import machine

    path = Path(args.output) if args.output else None
    before = json.loads(path.read_text()) if path and path.exists() else {}
    reference = before.get("losses") or trained("torch", {})["losses"]
    print(f"{'engine':7}{'mesh':28}{'form':10}{'difference':>11}{'parameters':>12}{'plan':>11}{'state':>12}")
    for engine, form in itertools.product(args.engines, args.forms):
        if form == "flax" and engine != "jax":
            continue
        for mesh in meshes_of(declared_axes(engine)):
            if args.only and named(mesh) not in args.only:
                continue
            row = row_of(engine, mesh, form, reference)
            print(f"{engine:7}{named(mesh):28}{form:10}", end="")
            if "error" in row:
                print(row["error"])
            else:
                kept = f"{row['parameters']:12,}{row['predicted']:11,}{row['state']:12,}"
                print(f"{row['difference']:11.1e}{kept}", flush=True)
            if path is not None:  # row by row: all of them take a while
                found = {"machine": machine(), "steps": len(reference), "losses": reference}
                path.write_text(json.dumps({**found, "rows": with_row(path, row)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
