"""Write and read bandwidth of checkpoints at 1 GB, beside torch.save, torch DCP, safetensors and Orbax, and what asynchronous saving costs.

python benchmarks/checkpoints.py [--gigabytes 1] [--rounds 5] [--folder FOLDER] [--no-stall] [--no-bandwidth]

All contenders write and read the same arrays in turn, the order flipped each round; dirty pages of one are flushed before the next
starts. `+ fsync` is the same with every file and the folder flushed to the disk afterwards. A read ends with the values copied into
arrays that were there before, as a training process does it; `cold` means that the page cache was told to forget the files. How often
a contender calls fsync is counted by strace.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from interleaved import save

HIDDEN = 1024


def shapes(gigabytes):
    """Arrays of a transformer, as many layers as fit."""
    found = {"embedding.weight": (32000, HIDDEN)}
    layer = {
        "attention.qkv.weight": (3 * HIDDEN, HIDDEN),
        "attention.qkv.bias": (3 * HIDDEN,),
        "attention.out.weight": (HIDDEN, HIDDEN),
        "attention.out.bias": (HIDDEN,),
        "mlp.up.weight": (4 * HIDDEN, HIDDEN),
        "mlp.up.bias": (4 * HIDDEN,),
        "mlp.down.weight": (HIDDEN, 4 * HIDDEN),
        "mlp.down.bias": (HIDDEN,),
        "norm1.weight": (HIDDEN,),
        "norm2.weight": (HIDDEN,),
    }
    number = 0
    while sum(np.prod(shape) * 4 for shape in found.values()) < gigabytes * 1e9:
        found |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
        number += 1
    return found


def make_arrays(gigabytes):
    """Random float32: no disk or compressor can make less of it."""
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes(gigabytes).items()}


# -- contenders: write(arrays, folder) and read(folder, into) -----------------------------------------------------------------


def torch_tensors(arrays):
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def fill(into, values):
    for name, target in into.items():
        np.copyto(target, np.asarray(values[name]))


def write_plain(arrays, folder):
    """The disk's own limit: the same bytes into one file, then one fsync."""
    folder.mkdir()
    with (folder / "all").open("wb", buffering=0) as file:
        for array in arrays.values():
            file.write(array.reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def read_plain(folder, into):
    with (folder / "all").open("rb", buffering=0) as file:
        for target in into.values():
            view = memoryview(target.reshape(-1).view(np.uint8))
            while len(view):
                view = view[file.readinto(view) :]


def write_polyaccel(arrays, folder):
    from polyaccel.checkpoint import Contents, begin_checkpoint, write_checkpoint
    from polyaccel.protocols import Shard

    shards = [Shard(n, a.shape, (0,) * a.ndim, "float32", a) for n, a in arrays.items()]
    contents = Contents(groups={"model": shards})
    attempt = begin_checkpoint(folder)
    write_checkpoint(folder, contents, attempt=attempt, process_index=0, num_processes=1, facts={})


def read_polyaccel(folder, into, verify=True):
    from polyaccel.checkpoint import open_checkpoint

    for shard in open_checkpoint(folder, verify=verify).shards("model"):
        np.copyto(into[shard.name], shard.data)


def read_polyaccel_unverified(folder, into):
    read_polyaccel(folder, into, verify=False)


def write_torch(arrays, folder):
    import torch

    folder.mkdir()
    torch.save(torch_tensors(arrays), folder / "all.pt")


def read_torch(folder, into):
    import torch

    fill(into, torch.load(folder / "all.pt", weights_only=True))


def write_dcp(arrays, folder):
    import torch.distributed.checkpoint as dcp

    dcp.save(torch_tensors(arrays), checkpoint_id=folder, no_dist=True)


def read_dcp(folder, into):
    import torch.distributed.checkpoint as dcp

    dcp.load(torch_tensors(into), checkpoint_id=folder, no_dist=True)  # fills the tensors that it is given


def write_safetensors(arrays, folder):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(torch_tensors(arrays), folder / "all.safetensors")


def read_safetensors(folder, into):
    from safetensors.torch import load_file

    fill(into, load_file(folder / "all.safetensors"))


def write_orbax(arrays, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, arrays)
        checkpointer.wait_until_finished()


def read_orbax(folder, into):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        fill(into, checkpointer.restore(folder, into))


def and_fsync(write):
    def both(arrays, folder):
        write(arrays, folder)
        for file in [*sorted(folder.rglob("*")), folder]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    return both


@dataclass
class Contender:
    write: object
    read: object
    version_of: str | None = None
    write_s: list = field(default_factory=list)
    warm_s: list = field(default_factory=list)
    cold_s: list = field(default_factory=list)


def contenders():
    return {
        "plain write + fsync (the disk)": Contender(write_plain, read_plain),
        "polyaccel": Contender(write_polyaccel, read_polyaccel, "polyaccel"),
        "polyaccel, read without verifying": Contender(None, read_polyaccel_unverified, "polyaccel"),
        "torch.save": Contender(write_torch, read_torch, "torch"),
        "torch.save + fsync": Contender(and_fsync(write_torch), None, "torch"),
        "torch DCP": Contender(write_dcp, read_dcp, "torch"),
        "torch DCP + fsync": Contender(and_fsync(write_dcp), None, "torch"),
        "safetensors.save_file": Contender(write_safetensors, read_safetensors, "safetensors"),
        "safetensors.save_file + fsync": Contender(and_fsync(write_safetensors), None, "safetensors"),
        "Orbax": Contender(write_orbax, read_orbax, "orbax-checkpoint"),
        "Orbax + fsync": Contender(and_fsync(write_orbax), None, "orbax-checkpoint"),
    }


# -- the race -----------------------------------------------------------------------------------------------------------------


def forget(folder):
    """Ask the page cache to drop the files; clean pages only, so they are flushed first."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def one_round(names, field_of, arrays, into, root):
    for name in names:
        contender = field_of[name]
        folder = root / "checkpoint"
        os.sync()
        write = contender.write or write_polyaccel
        seconds = timed(write, arrays, folder)
        if contender.write:
            contender.write_s.append(seconds)
        if contender.read:
            contender.warm_s.append(timed(contender.read, folder, into))
            forget(folder)
            contender.cold_s.append(timed(contender.read, folder, into))
            wrong = [key for key, value in arrays.items() if not np.array_equal(value, into[key])]
            assert not wrong, f"{name} read something else: {wrong}"
            for target in into.values():
                target.fill(0)
        shutil.rmtree(folder)


def count_fsyncs(name):
    """fsync and fdatasync calls of one small write, or None without strace."""
    if shutil.which("strace") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        command = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync,sync_file_range,syncfs,msync", "-o", str(trace)]
        command += [sys.executable, __file__, "--write-one", name, "--folder", folder, "--gigabytes", "0.001"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return sum(line.split(None, 1)[1].startswith(("fsync", "fdatasync", "sync", "msync")) for line in trace.open())


def bandwidth(options):
    from importlib.metadata import version

    arrays = make_arrays(options.gigabytes)
    size = sum(array.nbytes for array in arrays.values())
    into = {name: np.zeros_like(array) for name, array in arrays.items()}
    field_of = contenders()
    root = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=options.folder))
    warm_up = {name: array for name, array in arrays.items() if array.size < 1e5}
    try:
        one_round(field_of, contenders(), warm_up, {name: np.zeros_like(a) for name, a in warm_up.items()}, root)
        for number in range(options.rounds):
            names = list(field_of) if number % 2 else list(reversed(field_of))
            one_round(names, field_of, arrays, into, root)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    finally:
        shutil.rmtree(root)
    rows = {}
    for name, contender in field_of.items():
        row = {key: speeds(getattr(contender, f"{key}_s"), size) for key in ("write", "warm", "cold")}
        row["fsyncs"] = count_fsyncs(name) if contender.write else None
        row["version"] = version(contender.version_of) if contender.version_of else None
        rows[name] = row
    show(rows)
    return {"bytes": size, "num_arrays": len(arrays), "rounds": options.rounds, "contenders": rows}


def speeds(seconds, size):
    if not seconds:
        return None
    return {
        "gb_per_s": size / statistics.median(seconds) / 1e9,
        "best_gb_per_s": size / min(seconds) / 1e9,  # other work on the machine slows a disk in bursts
        "seconds": [round(value, 4) for value in seconds],
    }


def show(rows):
    print(f"\n{'GB/s, median (best)':36} {'write':>13} {'fsyncs':>7} {'read warm':>13} {'read cold':>13}")
    for name, row in rows.items():
        cells = [
            f"{row[key]['gb_per_s']:.2f} ({row[key]['best_gb_per_s']:.2f})" if row[key] else ""
            for key in ("write", "warm", "cold")
        ]
        fsyncs = "" if row["fsyncs"] is None else row["fsyncs"]
        print(f"{name:36} {cells[0]:>13} {fsyncs:>7} {cells[1]:>13} {cells[2]:>13}")


def stall(options):
    """How long `save_state` keeps a training of 0.8 GB (model and Adam) from its next step, when it waits and when it does not."""
    import torch

    from polyaccel import Accelerator

    accelerator = Accelerator(backend="torch", cpu=True)
    layers = [torch.nn.Linear(2048, 2048) for _ in range(16)]
    model = torch.nn.Sequential(*layers)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    batch = torch.randn(4, 2048)

    def step():
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    size = 3 * 4 * sum(parameter.numel() for parameter in model.parameters())
    root = Path(tempfile.mkdtemp(prefix="stall-", dir=options.folder))
    times = {"blocking": [], "asynchronous": [], "until complete": [], "step": [], "step while writing": []}
    try:
        for number in range(options.rounds + 1):
            os.sync()
            times["step"] += [timed(step) for _ in range(5)]
            blocking, background = root / f"blocking{number}", root / f"background{number}"
            times["blocking"].append(timed(lambda: accelerator.save_state(blocking, blocking=True)))  # noqa: B023
            shutil.rmtree(blocking)
            os.sync()
            start = time.perf_counter()
            times["asynchronous"].append(timed(accelerator.save_state, background))
            while not (background / "manifest.json").exists():
                times["step while writing"].append(timed(step))
            accelerator.wait_for_checkpoint()
            times["until complete"].append(time.perf_counter() - start)
            shutil.rmtree(background)
            if number == 0:  # the first of each finds cold memory
                times = {name: [] for name in times}
    finally:
        accelerator.end_training()
        shutil.rmtree(root)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    shares = [mine / theirs for mine, theirs in zip(times["asynchronous"], times["blocking"], strict=True)]
    print(f"\nsave_state of {size / 1e9:.2f} GB, seconds, median")
    for name, seconds in medians.items():
        print(f"{name:36} {seconds:7.3f}")
    print(f"{'share of the time that training stops':36} {statistics.median(shares):7.3f}")
    return {"bytes": size, "seconds": times, "median": medians, "share": statistics.median(shares)}


def disk(folder):
    """What dd says of the disk: 1 GB written and flushed, and read back past the page cache."""
    file = Path(folder) / "dd.out"
    found = {}
    for key, command in {
        "dd write 1 GB of zeros, conv=fsync": ["dd", "if=/dev/zero", f"of={file}", "bs=16M", "count=64", "conv=fsync"],
        "dd write 1 GB of zeros, oflag=direct": [
            "dd",
            "if=/dev/zero",
            f"of={file}",
            "bs=16M",
            "count=64",
            "oflag=direct",
        ],
        "dd read 1 GB, iflag=direct": ["dd", f"if={file}", "of=/dev/null", "bs=16M", "iflag=direct"],
    }.items():
        said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
        found[key] = said.stderr.strip().splitlines()[-1].rpartition(", ")[2]
    file.unlink()
    for key, value in found.items():
        print(f"{key:36} {value}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--no-bandwidth", action="store_true")
    parser.add_argument("--no-stall", action="store_true")
    parser.add_argument("--write-one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_one:
        contenders()[options.write_one].write(make_arrays(options.gigabytes), options.folder / "one")
        return
    results = {"load_average_at_start": os.getloadavg()[0], "disk": disk(options.folder)}
    if not options.no_bandwidth:
        results["bandwidth"] = bandwidth(options)
    if not options.no_stall:
        results["stall"] = stall(options)
    results["load_average_at_end"] = os.getloadavg()[0]
    save(Path(__file__).parent / "results" / "checkpoints.json", results)


if __name__ == "__main__":
    main()
