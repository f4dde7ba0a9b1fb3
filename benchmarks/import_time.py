"""CPU time, user and system, of `import polyaccel` and of the help of every command: medians over 20 runs in turn.

python benchmarks/import_time.py
"""

import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from interleaved import save

from polyaccel.cli.main import COMMANDS

ROUNDS = 20
PROGRAM = shutil.which("polyaccel", path=str(Path(sys.executable).parent)) or "polyaccel"
MEASURED = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import polyaccel": [sys.executable, "-c", "import polyaccel"],
    "from polyaccel import Accelerator": [sys.executable, "-c", "from polyaccel import Accelerator"],
    "polyaccel --help": [PROGRAM, "--help"],
    **{f"polyaccel {name} --help": [PROGRAM, name, "--help"] for name in COMMANDS},
}


def cpu_ms(command):
    """CPU time of one process, from the operating system's own accounts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main():
    times = {name: [] for name in MEASURED}
    for _ in range(ROUNDS):
        for name, command in MEASURED.items():
            times[name].append(cpu_ms(command))
    bare = statistics.median(times["bare interpreter"])
    rows = {
        name: {"cpu_ms": statistics.median(t), "cpu_ms_max": max(t), "over_bare_ms": statistics.median(t) - bare}
        for name, t in times.items()
    }
    for name, row in rows.items():
        print(f"{name:36} {row['cpu_ms']:7.1f} ms (at most {row['cpu_ms_max']:.0f})  {row['over_bare_ms']:+7.1f} ms")
    save(Path(__file__).parent / "results" / "import_time.json", {"rounds": ROUNDS, "cpu": rows})


if __name__ == "__main__":
    main()
