"""What a launcher adds to `python script.py`: wall and CPU time of a script that trains one small step, started in each way in turn.

python benchmarks/launch_overhead.py [--rounds 5]

Differences within a round are the result; on a machine that does other things as well (`load`), those of CPU time alone. `torchrun` and
`accelerate launch` take part where they are installed.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interleaved import save

SCRIPT = """
import numpy as np
from polyaccel import Accelerator
from polyaccel.registry import load_backend
accelerator = Accelerator(cpu=True)
case = load_backend(accelerator.backend).case()
model = case.model(np.ones((3, 2), np.float32), np.zeros(2, np.float32))
optimizer = case.optimizer(model, 0.1)
rows = 4 * accelerator.num_data_shards
loader = case.loader(np.ones((rows, 3), np.float32), np.ones((rows, 2), np.float32), 4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    accelerator.backward(case.loss, model, batch)
    optimizer.step()
accelerator.wait_for_everyone()
"""


def tool(name):
    return shutil.which(name, path=str(Path(sys.executable).parent))


def contenders(script):
    """(name, baseline's name or None, command) of everything that is installed."""
    torchrun, accelerate, polyaccel = tool("torchrun"), tool("accelerate"), tool("polyaccel")
    found = []
    for backend in ("torch", "jax"):
        plain = f"{backend}: python"
        found.append((plain, None, [sys.executable, script], backend))
        for count in (1, 2):
            ways = [
                (
                    "polyaccel launch",
                    [polyaccel, "launch", "--cpu", "--backend", backend, "--num-processes", str(count)],
                )
            ]
            if backend == "torch" and torchrun:
                ways.append(
                    (
                        "torchrun",
                        [torchrun, f"--nproc-per-node={count}", "--rdzv-endpoint=localhost:0", "--rdzv-backend=c10d"],
                    )
                )
            # On a CPU it starts one process, whatever the number (1.15).
            if backend == "torch" and accelerate and count == 1:
                options = ["--cpu", "--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no"]
                ways.append(("accelerate launch", [accelerate, "launch", *options, "--dynamo_backend", "no"]))
            found += [(f"{backend}: {name}, {count}", plain, [*way, script], backend) for name, way in ways]
    return found


def measure(command, backend, folder):
    """Wall and CPU seconds of one run to its end, all of its processes together."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLYACCEL_CONFIG_FILE": "off", "POLYACCEL_BACKEND": backend}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(folder) / "one_step.py")
        Path(script).write_text(SCRIPT)
        ways = contenders(script)
        times = {name: [] for name, *_ in ways}
        for number in range(rounds + 1):  # the first round warms caches
            for name, _, command, backend in ways if number % 2 else reversed(ways):
                found = measure(command, backend, folder)
                if number:
                    times[name].append(found)
    rows = {}
    print(f"{'':32} wall s   cpu s   more wall s   more cpu s")
    for name, baseline, *_ in ways:
        wall, cpu = (statistics.median(column) for column in zip(*times[name], strict=True))
        row = rows[name] = {"wall_s": wall, "cpu_s": cpu}
        line = f"{name:32} {wall:6.2f}  {cpu:6.2f}"
        if baseline is not None:
            pairs = list(zip(times[name], times[baseline], strict=True))
            row["more_wall_s"] = statistics.median(mine[0] - base[0] for mine, base in pairs)
            row["more_cpu_s"] = statistics.median(mine[1] - base[1] for mine, base in pairs)
            line += f"        {row['more_wall_s']:+6.2f}       {row['more_cpu_s']:+6.2f}"
        print(line)
    save(
        Path(__file__).parent / "results" / "launch_overhead.json",
        {"rounds": rounds, "load": os.getloadavg()[2], "runs": rows},
    )


if __name__ == "__main__":
    main()
