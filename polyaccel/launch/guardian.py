"""Beside a launcher, as `python -I -S guardian.py`: ends the launcher's processes at once where the launcher is killed itself.

It is told on its standard input which processes there are, and the end of that input is the launcher's: no signal of another process
is needed for it, and none can be missed. Standard library alone, and little of it, since every launch starts one.
"""

import os
import signal
import sys


def main() -> None:
    """Note what comes in, one line per process (`group 12`, `process 12`, `gone 12`), until the launcher has ended."""
    # A scheduler signals every process of a job, and this one is to see the others end.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    kinds: dict[int, str] = {}
    for line in sys.stdin.buffer:
        kind, _, number_text = line.decode("ascii").partition(" ")
        if kind == "gone":
            kinds.pop(int(number_text), None)
        else:
            kinds[int(number_text)] = kind
    for pid, kind in kinds.items():
        try:
            (os.killpg if kind == "group" else os.kill)(pid, signal.SIGKILL)
        except OSError:
            continue  # it has ended, or is another user's by now
    if kinds:
        numbers = ", ".join(map(str, kinds))
        words = f"polyaccel launch: the launcher was killed: so are its processes ({numbers})\n"
        try:
            os.write(2, words.encode())
        except OSError:
            return  # nobody reads it any more


if __name__ == "__main__":
    main()
