"""How a process of a job that a test has started answers its plan and leaves; asked_jobs.py is the other end. Not a test itself."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from polyaccel.errors import PolyaccelError


def answer(held, functions, between):
    """Answer the plan of the command line, calling `between` after each of its parts."""
    results = []
    for name, *arguments in json.loads(sys.argv[1]):
        print(f"{time.monotonic():.0f} s: {name} {arguments}", file=sys.stderr, flush=True)  # of one that does not end
        results.append(functions[name](*arguments))
        between()
    # More than a pipe takes that nobody reads yet.
    file = Path(sys.argv[2]) / f"{held.num_processes}.{held.process_index}.json"
    file.write_text(json.dumps(results))
    leave(held, str(file))


def leave(held, result):
    """Say the result, wait for the others and end."""
    print("RESULT " + json.dumps(result), flush=True)
    held.wait_for_everyone()
    held.end_training()


def run_job(main):
    """Run it; an error of polyaccel's is said in one line."""
    try:
        main()
    except PolyaccelError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
