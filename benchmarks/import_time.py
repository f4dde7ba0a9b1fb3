"""CPU time of `import polyaccel` and of `polyaccel --help` over the bare interpreter.

python benchmarks/import_time.py
"""

import resource
import statistics
import subprocess
import sys
from pathlib import Path

from interleaved import save

COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "import polyaccel": ["-c", "import polyaccel"],
    "from polyaccel import Accelerator": ["-c", "from polyaccel import Accelerator"],
    "polyaccel --help": ["-m", "polyaccel.cli.main", "--help"],
    "polyaccel launch --help": ["-m", "polyaccel.cli.main", "launch", "--help"],
}


def cpu_ms(command):
    """CPU time of one process, from the operating system's own accounts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main():
    times = {name: [] for name in COMMANDS}
    for _ in range(15):
        for name, command in COMMANDS.items():
            times[name].append(cpu_ms(command))
    bare = statistics.median(times["bare interpreter"])
    rows = {
        name: {"cpu_ms": statistics.median(t), "over_bare_ms": statistics.median(t) - bare} for name, t in times.items()
    }
    for name, row in rows.items():
        print(f"{name:36} {row['cpu_ms']:7.1f} ms  {row['over_bare_ms']:+7.1f} ms over the bare interpreter")
    save(Path(__file__).parent / "results" / "import_time.json", {"cpu": rows})


if __name__ == "__main__":
    main()
