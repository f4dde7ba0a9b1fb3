"""Jobs for other machines: what is written, what the cluster's program is called with, and that its failure is a failure."""

import importlib.util
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from polyaccel.cli.main import main

CRD = Path(__file__).parents[3] / "shared" / "data" / "jobset_crd_v1alpha2.yaml"


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train it.py"
    path.write_text("")
    return path


@pytest.fixture
def fake_tool(tmp_path, monkeypatch):
    """A program on PATH that writes down its arguments and its input, prints a text and ends with a code."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name, *, prints="", code=0):
        seen = tmp_path / f"{name}.seen"
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport json, sys\n"
            f"stdin = '' if sys.stdin.isatty() or {name!r} in ('gcloud', 'ssh') else sys.stdin.read()\n"
            f"open({str(seen)!r}, 'a').write(json.dumps([sys.argv[1:], stdin]) + '\\n')\n"
            f"print({prints!r}, end='')\nsys.exit({code})\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return lambda: [yaml.safe_load(line) for line in seen.read_text().splitlines()]

    return make


def launch(*arguments):
    return main(["launch", *map(str, arguments)])


# -- Slurm -------------------------------------------------------------------------------------------------------------------


def test_an_sbatch_script_starts_one_launcher_per_node_with_every_setting(script, capsys):
    options = ["--num_machines", 2, "--mixed_precision", "bf16", "--slurm.partition", "gpu", "--slurm.gpus_per_node", 8]
    assert launch("--on", "slurm", "--emit", *options, script, "--name", "a b") == 0
    text = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=8",
    ):
        assert line in text.splitlines()
    assert "#SBATCH --requeue" in text
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text
    run = shlex.split(next(line for line in text.splitlines() if line.startswith("srun")))
    command = run[run.index("-c") + 1].removeprefix("trap : TERM USR1; ").partition("; code=")[0]
    assert shlex.split(command) == [
        *["polyaccel", "launch", "--mixed-precision", "bf16", "--preemption", "save", "--num-machines=2"],
        *[str(script), "--name", "a b"],
    ]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_job_of_slurm_saves_when_it_is_signalled_unless_the_setting_says_otherwise(script, capsys):
    assert launch("--on", "slurm", "--emit", script) == 0
    assert "--preemption save" in capsys.readouterr().out
    assert launch("--on", "slurm", "--emit", "--preemption", "off", script) == 0
    assert "--preemption" not in capsys.readouterr().out
    assert launch("--on", "hosts", "--hosts.names", "a,b", "--emit", script) == 0
    assert "--preemption" not in capsys.readouterr().out


def test_the_job_is_handed_to_sbatch_and_its_number_told(script, capsys, fake_tool):
    seen = fake_tool("sbatch", prints="1234;cluster\n")
    assert launch("--on", "slurm", script) == 0
    assert "job 1234; its output goes to slurm-1234.out" in capsys.readouterr().out
    [[arguments, text]] = seen()
    assert arguments == ["--parsable"]
    assert text.startswith("#!/bin/bash")


def test_what_sbatch_says_of_a_wrong_partition_is_shown(script, capsys, fake_tool):
    fake_tool("sbatch", prints="sbatch: error: invalid partition specified: x", code=1)
    assert launch("--on", "slurm", "--slurm.partition", "x", script) == 1
    assert "invalid partition specified" in capsys.readouterr().err


def test_a_machine_without_the_clusters_program_gets_the_way_out(script, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert launch("--on", "slurm", script) == 1
    assert "sbatch is not installed" in (err := capsys.readouterr().err)
    assert "--emit" in err


# -- TPU pods ----------------------------------------------------------------------------------------------------------------


def test_gcloud_is_called_once_for_all_workers_with_quoted_arguments(script, capsys, fake_tool):
    ended = "step 1\npolyaccel-worker w-0 exit 0\npolyaccel-worker w-1 exit 0\n"
    seen = fake_tool("gcloud", prints=ended)
    options = [
        "--tpu_pod.name",
        "my-tpu",
        "--tpu_pod.zone",
        "us-x1",
        "--tpu_pod.workdir",
        "my code",
        "--backend",
        "jax",
    ]
    assert launch("--on", "tpu-pod", *options, script, "it's; rm -rf x") == 0
    [[arguments, _]] = seen()
    assert arguments[:7] == ["compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--zone=us-x1", "--worker=all"]
    remote = arguments[7].removeprefix("--command=")
    assert remote.splitlines()[0] == "set -e"
    assert "cd 'my code'" in remote.splitlines()
    assert shlex.split(remote.splitlines()[-1]) == [
        "polyaccel",
        "launch",
        "--backend",
        "jax",
        str(script),
        "it's; rm -rf x",
    ]
    assert subprocess.run(["bash", "-n", "-c", remote], check=False).returncode == 0
    captured = capsys.readouterr()
    assert captured.out == "step 1\n"
    assert [line.split() for line in captured.err.splitlines()[1:]] == [["w-0", "ok"], ["w-1", "ok"]]


def test_a_worker_that_failed_is_named_and_the_launch_fails(script, capsys, fake_tool):
    fake_tool("gcloud", prints="polyaccel-worker w-0 exit 0\npolyaccel-worker w-1 exit 3\n", code=1)
    assert launch("--on", "tpu-pod", "--tpu_pod.name", "t", script) == 3
    assert "w-1                            failed with exit code 3" in capsys.readouterr().err


@pytest.mark.parametrize("prints", ["", "polyaccel-worker w-0 exit 0\n"])
def test_a_failure_of_gcloud_itself_is_a_failure(script, capsys, fake_tool, prints):
    fake_tool("gcloud", prints=prints, code=255)
    assert launch("--on", "tpu-pod", "--tpu_pod.name", "t", script) == 255
    assert "gcloud failed with exit code 255" in capsys.readouterr().err


def test_silence_is_no_success(script, fake_tool):
    fake_tool("gcloud")
    assert launch("--on", "tpu-pod", "--tpu_pod.name", "t", script) == 1


def test_what_a_worker_runs_tells_its_place_and_how_it_ended(script, tmp_path, fake_tool, capsys):
    """The remote text itself, with a metadata server that is a fake curl."""
    endpoints = "id0:8470:10.0.0.1,id1:8470:10.0.0.2"
    tool = tmp_path / "bin" / "curl"
    tool.write_text(f"#!/bin/sh\ncase $4 in */agent-worker-number) echo 1;; *) echo {endpoints};; esac\n")
    tool.chmod(0o755)
    fake = tmp_path / "bin" / "polyaccel"
    fake.write_text('#!/bin/sh\necho "$TPU_WORKER_ID of $TPU_WORKER_HOSTNAMES"; exit 4\n')
    fake.chmod(0o755)
    assert launch("--on", "tpu-pod", "--emit", "--tpu_pod.name", "t", script) == 0
    remote = shlex.split(capsys.readouterr().out)[-1].removeprefix("--command=")
    done = subprocess.run(["bash", "-c", remote], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0] == "1 of 10.0.0.1,10.0.0.2", done.stderr
    assert done.stdout.splitlines()[-1].endswith("exit 4")
    assert done.returncode == 4


# -- Kubernetes --------------------------------------------------------------------------------------------------------------


def closed(schema):
    """The schema with every object closed: a misspelled field is a mistake then."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        open_map = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-int-or-string")
        if schema.get("type") == "object" and "properties" in schema and not open_map:
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        schema = [closed(item) for item in schema]
    return schema


@pytest.fixture
def validator():
    if not CRD.is_file() or importlib.util.find_spec("jsonschema") is None:
        pytest.skip("needs jsonschema and the JobSet CustomResourceDefinition, which stands beside the repository")
    import jsonschema

    versions = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1alpha2")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(closed(schema))


OPTIONS = ["--on", "kubernetes", "--num_machines", "4", "--kubernetes.image", "registry.example/train:1"]


def emitted(capsys, *arguments):
    assert launch(*OPTIONS, "--emit", *arguments) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_a_jobset_is_what_the_real_schema_allows(script, capsys, validator):
    more = ["--kubernetes.gpus_per_node", 8, "--max_restarts", 2, "--kubernetes.memory", "64Gi"]
    tree = emitted(capsys, *more, script)
    assert list(validator.iter_errors(tree)) == []
    tree["spec"]["replicatedJob"] = tree["spec"].pop("replicatedJobs")
    assert list(validator.iter_errors(tree)), "the schema would not see a misspelled field"


def test_the_pods_of_a_jobset_find_each_other(script, capsys):
    from polyaccel.launch.rendezvous import machines_from_environment

    tree = emitted(capsys, "--kubernetes.name", "run-1", "--max_restarts", 2, "--mixed-precision", "bf16", script, "x")
    job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    container = job["template"]["spec"]["containers"][0]
    assert container["command"] == ["polyaccel", "launch", "--mixed-precision", "bf16", str(script), "x"]
    assert tree["spec"]["failurePolicy"] == {"maxRestarts": 2}
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    found = machines_from_environment({**environment, "JOB_COMPLETION_INDEX": "3"})
    assert (found.num_machines, found.machine_rank, found.address) == (4, 3, "run-1-workers-0-0.run-1")


def test_a_tpu_slice_is_selected(script, capsys):
    tpu = [
        "--kubernetes.tpu_accelerator",
        "tpu-v5-lite-podslice",
        "--kubernetes.tpu_topology",
        "4x4",
        "--kubernetes.tpus_per_node",
        4,
    ]
    pod = emitted(capsys, *tpu, script)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


@pytest.mark.parametrize(("backend", "runtime"), [("torch", "torch-distributed"), ("jax", "jax-distributed")])
def test_a_trainjob_names_the_engines_runtime(script, capsys, backend, runtime):
    tree = emitted(capsys, "--kubernetes.kind", "trainjob", "--backend", backend, script)
    assert (tree["kind"], tree["spec"]["runtimeRef"]["name"], tree["spec"]["trainer"]["numNodes"]) == (
        "TrainJob",
        runtime,
        4,
    )


def test_a_manifest_without_image_or_with_a_wrong_name_is_refused(script, capsys):
    assert launch("--on", "kubernetes", "--emit", script) == 1
    assert "--kubernetes.image is not given" in capsys.readouterr().err
    assert launch(*OPTIONS, "--emit", "--kubernetes.name", "My_Job", script) == 1
    assert "'My_Job' is no name of a Kubernetes object" in capsys.readouterr().err


def test_kubectl_gets_the_manifest(script, capsys, fake_tool):
    seen = fake_tool("kubectl", prints="jobset.jobset.x-k8s.io/polyaccel created\n")
    assert launch(*OPTIONS, script) == 0
    [[arguments, text]] = seen()
    assert arguments == ["apply", "-f", "-"]
    assert yaml.safe_load(text)["kind"] == "JobSet"
    assert "created" in capsys.readouterr().out


# -- plain machines ----------------------------------------------------------------------------------------------------------


def test_every_machine_gets_its_rank_by_ssh(script, fake_tool):
    seen = fake_tool("ssh")
    options = ["--on", "hosts", "--hosts.names", "me@node0,node1", "--main_process_port", 1234]
    assert launch(*options, "--num_processes", 4, script) == 0
    calls = {arguments[3]: arguments[4] for arguments, _ in seen()}
    assert set(calls) == {"me@node0", "node1"}
    words = shlex.split(calls["node1"].splitlines()[-1])
    place = dict(zip(words[3::2], words[4::2], strict=False))
    assert (place["--num-processes"], place["--num-machines"], place["--machine-rank"]) == ("4", "2", "1")
    assert (place["--main-process-ip"], place["--main-process-port"]) == ("node0", "1234")


def test_a_machine_that_fails_is_a_failure(script, fake_tool, capfd):
    fake_tool("ssh", prints="no route\n", code=255)
    assert launch("--on", "hosts", "--hosts.names", "a,b", script) == 255
    assert "no route" in capfd.readouterr().out
