"""Runs Hugging Face Accelerate's own tests against polyaccel: a checkout of theirs, copied elsewhere with the imports renamed.

    python tests/upstream/accelerate_suite.py CHECKOUT [--work DIR] [--only test_logging ...] [--processes 1 2]

CHECKOUT is a folder with Accelerate's sources; nothing of it enters this repository. Per file of their suite, script and example the
number of passed, failed and skipped tests is printed, and written as JSON with --output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

SUITE = (
    "test_accelerator",
    "test_data_loader",
    "test_scheduler",
    "test_optimizer",
    "test_grad_sync",
    "test_state_checkpointing",
    "test_logging",
    "test_kwargs_handlers",
    "test_tracking",
    "test_memory_utils",
    "test_cpu",
    "test_utils",
)
SCRIPTS = ("test_script", "test_sync", "test_ops", "external_deps/test_metrics", "test_distributed_data_loop")
# Their helpers are a part of their package: they are found under ours, from the copy.
SITE = '''"""Accelerate's test helpers, renamed, under polyaccel's name."""
import importlib.abc, importlib.util, sys
from pathlib import Path

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if not (name + ".").startswith("polyaccel.test_utils."):
            return None
        place = Path(__file__).parent.joinpath(*name.split(".")[1:])
        if place.is_dir():
            return importlib.util.spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
        return importlib.util.spec_from_file_location(name, place.with_suffix(".py"))

sys.meta_path.insert(0, Finder())
'''


def renamed(checkout: Path, work: Path) -> None:
    """The copy: their tests, test helpers and examples, importing polyaccel."""
    for source, target in (("src/accelerate/test_utils", "test_utils"), ("tests", "tests"), ("examples", "examples")):
        shutil.copytree(checkout / source, work / target, dirs_exist_ok=True)
    for path in work.rglob("*.py"):
        text = path.read_text()
        text = re.sub(r"\b(from|import) accelerate\b", r"\1 polyaccel", text)
        text = re.sub(r"(?<![\w/.-])accelerate\.(?=[a-zA-Z_])", "polyaccel.", text)
        text = re.sub(r"([\"'])accelerate([\"'])", r"\1polyaccel\2", text)
        text = re.sub(r"(?<=[ (\[=])accelerate(?=\))", "polyaccel", text)
        path.write_text(text)
    (work / "sitecustomize.py").write_text(SITE)


def environment(work: Path, backend: str) -> dict[str, str]:
    """Their names come from the copy; nothing asks the network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")]),
        "POLYACCEL_BACKEND": backend,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_file(work: Path, name: str, backend: str, timeout_s: int) -> dict[str, object]:
    """One test file under pytest."""
    report = work / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", f"tests/{name}.py"]
    try:
        done = subprocess.run(
            command,
            cwd=work,
            env=environment(work, backend),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not finished after {timeout_s} s"}
    (work / f"{name}.log").write_text(done.stdout + done.stderr)
    if not report.exists():
        return {"status": (done.stdout + done.stderr).strip().splitlines()[-1:]}
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    names = [
        f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}: {(bad.get('message') or '').splitlines()[0][:150]}"
        for case in suite.iter("testcase")
        for bad in [*case.findall("failure"), *case.findall("error")]
    ]
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": skipped,
        "failures": names,
    }


def run_script(work: Path, name: str, processes: int, backend: str, timeout_s: int) -> dict[str, object]:
    """One of their scripts, under `polyaccel launch`."""
    command = [sys.executable, "-m", "polyaccel.cli.main", "launch", "--cpu", "--num_processes", str(processes)]
    command.append(str(work / "test_utils" / "scripts" / f"{name}.py"))
    try:
        done = subprocess.run(
            command,
            cwd=work,
            env=environment(work, backend),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not finished after {timeout_s} s"}
    (work / f"{Path(name).name}-{processes}.log").write_text(done.stdout + done.stderr)
    last = (done.stdout + done.stderr).strip().splitlines()[-1:] if done.returncode else []
    return {"exit code": done.returncode, "last line": "".join(last)[:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the copy (default: a temporary one)")
    parser.add_argument("--only", nargs="+", default=[*SUITE, *SCRIPTS])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--timeout", type=int, default=600)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="accelerate-suite-"))
    renamed(args.checkout, work)
    results: dict[str, object] = {}
    for name in args.only:
        if name in SUITE:
            results[name] = run_file(work, name, args.backend, args.timeout)
            print(name, json.dumps(results[name], indent=1), flush=True)
        for processes in args.processes if name in SCRIPTS else ():
            key = f"{name}, {processes} process(es)"
            results[key] = run_script(work, name, processes, args.backend, args.timeout)
            print(key, json.dumps(results[key]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
