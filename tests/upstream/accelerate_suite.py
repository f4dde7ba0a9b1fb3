"""Runs Hugging Face Accelerate's own tests against polyaccel: a checkout of theirs, copied elsewhere with the imports renamed.

    python tests/upstream/accelerate_suite.py CHECKOUT [--work DIR] [--only test_logging ...] [--processes 1 2]
        [--backend accelerate torch jax]

CHECKOUT is a folder with Accelerate's sources; nothing of it enters this repository. Per file of their suite, script and example the
number of passed, failed and skipped tests is printed, and written as JSON with --output. Examples load what they want of the hub from
small local folders (stand_ins.py); with the backend "accelerate" in front, their losses are compared with Accelerate's own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from accelerate_examples import EXAMPLES, MENDED, REFERENCE, difference, run_example
from stand_ins import CLASSIFIER, make_stand_ins

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
    "test_examples",
    "test_big_modeling",
    "test_hooks",
    "test_modeling_utils",
    "test_offload",
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
    shutil.copytree(checkout / "examples", work / "reference", dirs_exist_ok=True)
    (work / "reference_run.py").write_text(REFERENCE)
    for folder, (name, (text, instead)) in product(("examples", "reference"), MENDED.items()):
        path = work / folder / f"{name}.py"
        path.write_text(path.read_text().replace(text, instead))
    for path in [path for folder in ("test_utils", "tests", "examples") for path in (work / folder).rglob("*.py")]:
        text = path.read_text()
        text = re.sub(r"\b(from|import) accelerate\b", r"\1 polyaccel", text)
        text = re.sub(r"(?<![\w/.-])accelerate\.(?=[a-zA-Z_])", "polyaccel.", text)
        text = re.sub(r"([\"'])accelerate([\"'])", r"\1polyaccel\2", text)
        text = re.sub(r"(?<=[ (\[=])accelerate(?=\))", "polyaccel", text)
        path.write_text(text)
    (work / "sitecustomize.py").write_text(SITE)


def environment(work: Path) -> dict[str, str]:
    """Their names come from the copy; nothing asks the network, nothing is left in the home folder, and saves wait as theirs do."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "POLYACCEL_BLOCKING_SAVES": "1",
        "PYTHONPATH": os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(work / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run(work: Path, command: list[str], log: str, timeout_s: int, **variables: str) -> tuple[int | None, str]:
    """(exit code, output) of a command in the copy; None for one that did not finish. The output is kept in `<log>.log`."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=work,
        env={**environment(work), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
            output, code = process.communicate()[0], None
    (work / f"{log}.log").write_text(output)
    return code, output


def run_file(work: Path, name: str, backend: str, timeout_s: int) -> dict[str, object]:
    """One test file under pytest."""
    report = work / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", f"tests/{name}.py"]
    code, output = run(work, command, f"{name}-{backend}", timeout_s, POLYACCEL_BACKEND=backend)
    if code is None or not report.exists():
        return {"status": f"not finished after {timeout_s} s" if code is None else output.strip().splitlines()[-1:]}
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


def launched(processes: int) -> list[str]:
    """The command that starts a script of theirs under polyaccel."""
    return ["-m", "polyaccel.cli.main", "launch", "--cpu", "--num_processes", str(processes)]


def run_script(work: Path, name: str, processes: int, backend: str, timeout_s: int) -> dict[str, object]:
    """One of their scripts, under `polyaccel launch`."""
    command = [*launched(processes), str(work / "test_utils" / "scripts" / f"{name}.py")]
    log = f"{Path(name).name}-{backend}-{processes}"
    code, output = run(work, command, log, timeout_s, POLYACCEL_BACKEND=backend)
    if code is None:
        return {"status": f"not finished after {timeout_s} s"}
    last = output.strip().splitlines()[-1:] if code else []
    return {"exit code": code, "last line": "".join(last)[:200]}


def run_examples(work: Path, name: str, processes: int, backend: str, timeout_s: int) -> Iterator[tuple[str, object]]:
    """An example of theirs, command by command, on one engine, or with Accelerate itself as the `backend` "accelerate"."""
    is_reference = backend == "accelerate"
    script = work / ("reference" if is_reference else "examples") / f"{name}.py"
    folder = work / "runs" / f"{name.replace('/', '-')}-{backend}-{processes}"
    shutil.rmtree(folder, ignore_errors=True)

    def launch(arguments: list[str], record: Path) -> tuple[int | None, str]:
        if is_reference:
            start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
            command = [*start, str(work / "reference_run.py"), str(script), *arguments]
            own = {"ACCELERATE_USE_CPU": "1"}
        else:
            command = [*launched(processes), str(script), *arguments]
            own = {"POLYACCEL_BACKEND": backend}
        log = str((folder / "last").relative_to(work))
        return run(work, command, log, timeout_s, POLYACCEL_RECORD=str(record), WANDB_MODE="offline", **own)

    for index, arguments in enumerate(EXAMPLES[name]):
        outcome = run_example(name, index, processes, launch, folder)
        found = outcome.report
        for other in ("accelerate", "torch"):
            reference = work / "runs" / folder.name.replace(f"-{backend}-", f"-{other}-") / f"record-{index}"
            if other != backend and not is_reference and reference.is_dir():
                found[f"against {other}"] = difference(reference, outcome.recording)
        yield f"{name} {arguments}".strip(), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the copy (default: a temporary one)")
    parser.add_argument("--only", nargs="+", default=[*SUITE, *SCRIPTS, *EXAMPLES], help="files, without .py")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--backend", nargs="+", default=["torch"], help='engines; "accelerate" first for the examples\' reference'
    )
    parser.add_argument("--timeout", type=int, default=600)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    unknown = sorted({*args.only} - {*SUITE, *SCRIPTS, *EXAMPLES})
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: known are {', '.join([*SUITE, *SCRIPTS, *EXAMPLES])}")
    work = args.work or Path(tempfile.mkdtemp(prefix="accelerate-suite-"))
    renamed(args.checkout, work)
    if {*args.only} & {*EXAMPLES, "test_examples"} and not (work / CLASSIFIER).exists():
        make_stand_ins(work / "tests" / "test_samples" / "MRPC", work)
    results: dict[str, object] = {}

    def report(key: str, found: object) -> None:
        results[key] = found
        print(key, json.dumps(found, indent=1), flush=True)
        if args.output:  # after each of them: the whole takes an hour
            args.output.write_text(json.dumps(results, indent=1))

    for name in args.only:
        engines = [one for one in args.backend if one != "accelerate" or name in EXAMPLES]
        for backend in engines if name in SUITE else ():
            report(f"{name}, {backend}", run_file(work, name, backend, args.timeout))
        for processes, backend in product(args.processes, engines) if name not in SUITE else ():
            where = f"{backend}, {processes} process(es)"
            if name in SCRIPTS:
                report(f"{name}, {where}", run_script(work, name, processes, backend, args.timeout))
            else:
                for call, found in run_examples(work, name, processes, backend, args.timeout):
                    report(f"{call}, {where}", found)


if __name__ == "__main__":
    main()
