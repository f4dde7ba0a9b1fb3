"""Times contenders side by side in one process: blocks of steps in turn, the order flipped each round, so that a drift of the
machine's speed hits all alike. Ratios within one run are the result; absolute times belong to the machine that is named."""

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Contender:
    """`step()` does one training step; `wait()` returns when all steps are done. Each is warmed up before anything is timed."""

    name: str
    step: object
    wait: object
    wall: list = field(default_factory=list)
    cpu: list = field(default_factory=list)


def race(contenders, *, rounds, steps, warm_up=5):
    """Microseconds per step of each contender: one entry of `wall` and `cpu` per round."""
    for contender in contenders:
        for _ in range(warm_up):
            contender.step()
        contender.wait()
    for number in range(rounds):
        for contender in contenders if number % 2 else reversed(contenders):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                contender.step()
            contender.wait()
            contender.wall.append((time.perf_counter() - wall) / steps * 1e6)
            contender.cpu.append((time.process_time() - cpu) / steps * 1e6)
    return contenders


def machine():
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} cores"


def report(title, contenders, baseline):
    """A table against the contender named `baseline`, and the same as a dict. The ratio is the median of the rounds' ratios."""
    base = next(contender for contender in contenders if contender.name == baseline)
    width = max(len(contender.name) for contender in contenders)
    print(f"\n{title}\n{'':{width}}  wall us/step  cpu us/step  extra wall us  ratio wall (quartiles)  ratio cpu")
    rows = {}
    for contender in contenders:
        ratios = [mine / theirs for mine, theirs in zip(contender.wall, base.wall, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        extra = statistics.median(m - t for m, t in zip(contender.wall, base.wall, strict=True))
        cpu_ratio = statistics.median(m / t for m, t in zip(contender.cpu, base.cpu, strict=True))
        row = {
            "wall_us": statistics.median(contender.wall),
            "cpu_us": statistics.median(contender.cpu),
            "extra_wall_us": extra,
            "ratio_wall": middle,
            "ratio_wall_quartiles": [low, high],
            "ratio_cpu": cpu_ratio,
        }
        rows[contender.name] = row
        print(
            f"{contender.name:{width}}  {row['wall_us']:12.1f}  {row['cpu_us']:11.1f}  {extra:+13.1f}"
            f"  {middle:10.3f} ({low:.3f}-{high:.3f})  {cpu_ratio:9.3f}"
        )
    return rows


def save(path, results):
    """Write the results with the machine's name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"\nwritten: {path}")
