"""How a step grows with devices and layers on the jax engine: compile time, bytes per device, bytes sent per step. Not wall time: the
devices are virtual ones of one CPU.

    python benchmarks/scaling.py                     # everything; rows that benchmarks/results/scaling.json has already are kept
    python benchmarks/scaling.py --parts weak layers
    python benchmarks/scaling.py --table             # prints what is there

weak: 2 windows of 64 bytes per data shard. strong: 8 windows in all. layers: 12, 24 and 48 of them on fsdp=4. plan: what `polyaccel plan`
says of the same runs on four devices. A GPT of 4 layers and width 128, AdamW, clipping by the norm. CPU seconds are given beside seconds,
since the machine may have other work. The runs on one number of devices share a process.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from interleaved import machine

SCRIPT = Path(__file__).with_name("scaling_run.py")
RESULTS = Path(__file__).parent / "results" / "scaling.json"
DEVICES = (1, 2, 4, 8)
FORMS = {"torch": ["--dialect", "torch", "--form", "fused"], "flax": ["--dialect", "flax"]}
LAYERS = (12, 24, 48)
IN_LAYERS = {
    "torch, train_step": ["--dialect", "torch", "--form", "fused"],
    "torch, backward(loss_fn)": ["--dialect", "torch", "--form", "function"],
    "flax, train_step": ["--dialect", "flax"],
    "flax, nnx.remat": ["--dialect", "flax", "--remat"],
    "flax, nnx.scan": ["--dialect", "flax", "--scan"],
}


def meshes(num_devices):
    """By name: data, fsdp, and fsdp x tensor."""
    if num_devices == 1:
        return {"1 device": {"data": 1}}
    found = {f"data {num_devices}": {"data": num_devices}, f"fsdp {num_devices}": {"fsdp": num_devices}}
    if num_devices > 2:
        found[f"fsdp {num_devices // 2} x tensor 2"] = {"fsdp": num_devices // 2, "tensor": 2}
    else:
        found["tensor 2"] = {"tensor": 2}
    return found


def shards_of(mesh):
    return mesh.get("data", 1) * mesh.get("fsdp", 1)


def devices_of(mesh):
    return shards_of(mesh) * mesh.get("tensor", 1)


def flags(mesh):
    return [text for axis, size in {"data": 1, **mesh}.items() for text in (f"--mesh.{axis}", str(size))]


def environment_for(num_devices):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
    }
    # What a step frees goes back to the system at once, so that the process's own peak is that of the step.
    environment |= {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "POLYACCEL_CONFIG_FILE": "off",
    }
    return environment


def checked(command, environment, folder):
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=3600)
    if done.returncode not in (0, 3):  # 3: a plan that does not fit
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def on_jax(num_devices, named):
    """Reports of runs, by (part, name): pairs of a mesh and the arguments of scaling_run.py."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{index}.json" for index in range(len(named))]
        pairs = [
            (mesh, [*arguments, "--report", str(report)])
            for (mesh, arguments), report in zip(named.values(), reports, strict=True)
        ]
        several = Path(folder) / "several.json"
        several.write_text(json.dumps(pairs))
        checked([sys.executable, str(SCRIPT), "--several", str(several)], environment_for(num_devices), folder)
        return {key: json.loads(report.read_text()) for key, report in zip(named, reports, strict=True)}


def planned(mesh, arguments):
    """What `polyaccel plan` says of such a run."""
    topology = f"cpu:{devices_of(mesh)}"
    command = [sys.executable, "-m", "polyaccel.cli.main", "plan", str(SCRIPT), "--topology", topology, "--json"]
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(checked([*command, *flags(mesh), "--", *arguments], environment_for(1), folder))
    sent = {}
    for one in found["collectives"]:
        entry = sent.setdefault(one["kind"], {"count": 0, "sent_bytes": 0})
        entry["count"] += one["count"]
        entry["sent_bytes"] += one["sent_bytes"]
    kept = {name: found[name] for name in ("parameter_bytes", "optimizer_bytes", "num_parameters")}
    kept["temporary_bytes"] = max(program["temporary_bytes"] for program in found["programs"])
    kept["flops"] = sum(program["flops"] * program["runs"] for program in found["programs"])
    return kept | {"collectives": sent}


def arguments_of(part, dialect, mesh):
    """A run's own: the batch grows with the data shards, or does not."""
    return [*FORMS[dialect], "--global-batch", "8" if part == "strong" else str(2 * shards_of(mesh))]


def measured(parts, results, only):
    """Yields (part, name, row) of what is asked for and not in the results."""

    def is_missing(part, name):
        return name not in results[part] and (not only or any(text in name for text in only))

    for num_devices in DEVICES:
        missing = {
            (part, f"{dialect}, {name}"): (mesh, arguments_of(part, dialect, mesh))
            for part in ("weak", "strong")
            for dialect in FORMS
            for name, mesh in meshes(num_devices).items()
            if part in parts and is_missing(part, f"{dialect}, {name}")
        }
        if missing:
            for (part, name), row in on_jax(num_devices, missing).items():
                yield part, name, row
    for num_layers in LAYERS if "layers" in parts else ():
        missing = {
            ("layers", f"{name}, {num_layers} layers"): ({"fsdp": 4}, [*form, "--layers", str(num_layers)])
            for name, form in IN_LAYERS.items()
            if is_missing("layers", f"{name}, {num_layers} layers")
        }
        for key, pair in missing.items():
            for (part, name), row in on_jax(4, {key: pair}).items():
                yield part, name, row
    for dialect in FORMS if "plan" in parts else ():
        for name, mesh in meshes(4).items():
            if is_missing("plan", f"{dialect}, {name}"):
                yield "plan", f"{dialect}, {name}", planned(mesh, arguments_of("weak", dialect, mesh))


def table(results):
    """Everything that was measured, as text."""
    for part in ("weak", "strong"):
        print(f"\n{part}: MB per device, and MB sent per step (by one device)")
        print(f"{'':28}{'parameters':>11}{'state':>8}{'temporary':>11}{'sent':>8}  exchanges; compile CPU s, MFLOP")
        for name, row in results.get(part, {}).items():
            sent = sum(one["sent_bytes"] for one in row["collectives"].values())
            kinds = ", ".join(f"{one['count']} {kind}" for kind, one in sorted(row["collectives"].items()))
            print(
                f"{name:28}{row['parameter_bytes'] / 1e6:11.2f}{row['optimizer_bytes'] / 1e6:8.2f}"
                f"{row['temporary_bytes'] / 1e6:11.2f}{sent / 1e6:8.2f}  {kinds}; {row['compile_cpu_s']:.1f} s,"
                f" {row['flops'] / 1e6:.0f}"
            )
    print(f"\n{'layers':44}{'capture s':>10}{'trace s':>9}{'compile s':>11}{'CPU s':>8}{'temporary MB':>14}")
    for name, row in results.get("layers", {}).items():
        cpu = row["trace_cpu_s"] + row["compile_cpu_s"]
        print(
            f"{name:44}{row['capture_s']:10.1f}{row['trace_s']:9.1f}{row['compile_s']:11.1f}{cpu:8.1f}"
            f"{row['temporary_bytes'] / 1e6:14.1f}"
        )
    print(
        f"\n{'plan, over what was measured':28}{'parameters':>11}{'state':>8}{'temporary':>11}{'sent':>8}{'FLOPs':>8}"
    )
    for name, row in results.get("plan", {}).items():
        real = results.get("weak", {}).get(name)
        if real is None:
            continue
        sums = [sum(one["sent_bytes"] for one in each["collectives"].values()) for each in (row, real)]
        pairs = [(row[key], real[key]) for key in ("parameter_bytes", "optimizer_bytes", "temporary_bytes")]
        ratios = "".join(
            f"{mine / max(theirs, 1):{width}.3f}" for (mine, theirs), width in zip(pairs, (11, 8, 11), strict=True)
        )
        sent = f"{sums[0] / sums[1]:8.3f}" if sums[1] else f"{'-':>8}"
        print(f"{name:28}{ratios}{sent}{row['flops'] / real['flops']:8.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ["weak", "strong", "plan", "layers"]
    parser.add_argument("--parts", nargs="+", choices=everything, default=everything)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names have one of these texts in them")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--table", action="store_true", help="print what is there, and measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    if not args.table:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "jax", "flax", "optax")}
        results = {"machine": machine(), "versions": versions, **{part: results.get(part, {}) for part in everything}}
        if args.again:
            results |= {part: {} for part in args.parts}
        for part, name, row in measured(args.parts, results, args.only):
            results[part][name] = row
            print(part, name, flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")  # a long run that is stopped loses little
    table(results)


if __name__ == "__main__":
    main()
