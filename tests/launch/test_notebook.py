"""A function started in several processes, as from a notebook. Each case is a process of its own: pytest's own has used jax."""

import signal
import subprocess
import sys

import pytest
from launching import has_ended

from polyaccel.launch.rendezvous import free_port
from polyaccel.registry import load_backend

ENGINES = [name for name in ("torch", "jax") if load_backend(name).probe().is_usable]


def run(code, tmp_path, *arguments):
    script = tmp_path / "notebook.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("backend", ENGINES)
def test_a_local_function_runs_in_two_processes_that_form_a_job(backend, tmp_path):
    done = run(
        "import sys\nimport numpy as np\nfrom polyaccel import Accelerator, notebook_launcher\n"
        "def to_array(accelerator, values):\n"
        "    if accelerator.backend == 'torch':\n"
        "        import torch\n        return torch.from_numpy(values)\n"
        "    import jax\n    return jax.numpy.asarray(values)\n"
        "def main():\n"
        "    factor = 10\n"
        "    def train(start):\n"  # a closure: nothing is sent to the processes, so nothing must be picklable
        "        accelerator = Accelerator()\n"
        "        mine = np.array([start + factor * accelerator.process_index])\n"
        "        total = accelerator.reduce(to_array(accelerator, mine), 'sum')\n"
        "        sys.stdout.write(f'saw {accelerator.num_processes} {accelerator.backend} {int(total[0])}\\n')\n"
        f"    notebook_launcher(train, (1,), num_processes=2, cpu=True, backend={backend!r}, mixed_precision='no')\n"
        "main()\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count(f"saw 2 {backend} 12") == 2  # 1 + 11


def test_one_process_runs_here_and_leaves_the_environment_as_it_was(tmp_path):
    done = run(
        "import os\nfrom polyaccel import notebook_launcher\nseen = []\nbefore = dict(os.environ)\n"
        "notebook_launcher(lambda: seen.append(os.environ['POLYACCEL_MIXED_PRECISION']), num_processes=1,"
        f" mixed_precision='bf16', backend={ENGINES[0]!r}, cpu=True)\n"
        "assert seen == ['bf16'] and dict(os.environ) == before\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_the_traceback_of_a_process_is_raised_here_and_the_others_are_stopped(tmp_path):
    done = run(
        "import os, time\nfrom polyaccel import debug_launcher\n"
        "def train():\n"
        "    if os.environ['RANK'] == '1': raise ValueError('the cause')\n"
        "    time.sleep(60)\n"
        "start = time.monotonic()\n"
        "try:\n    debug_launcher(train)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\nprint(time.monotonic() - start < 30)\n",
        tmp_path,
    )
    assert "LaunchError process 1 of 2 failed:\nTraceback" in done.stdout
    assert "ValueError: the cause\nhint: the others were stopped\nTrue" in done.stdout


def test_a_killed_process_is_told_by_its_exit_code(tmp_path):
    done = run(
        "import os\nfrom polyaccel import debug_launcher\ndebug_launcher(lambda: os.kill(os.getpid(), 9), num_processes=2)\n",
        tmp_path,
    )
    assert "failed with exit code -9" in done.stderr


@pytest.mark.skipif("jax" not in ENGINES, reason="needs jax")
def test_a_jax_that_is_in_use_cannot_be_forked(tmp_path):
    done = run(
        "import jax\njax.devices()\nfrom polyaccel import notebook_launcher\n"
        "notebook_launcher(print, num_processes=2, cpu=True, backend='jax')\n",
        tmp_path,
    )
    assert "2 processes cannot be forked from this one: jax has opened its devices here already" in done.stderr
    assert "restart the notebook's kernel" in done.stderr


def test_processes_start_again_after_a_failure_and_two_machines_are_one_job(tmp_path):
    done = run(
        "import multiprocessing, sys\n"
        f"import polyaccel_{ENGINES[0]}.engine\n"  # once, before the forks
        "from polyaccel import Accelerator\nfrom polyaccel.launchers import debug_launcher, notebook_launcher\n"
        "context = multiprocessing.get_context('fork')\n"
        "attempts = context.Value('i', 0)\n"
        "def train():\n"
        "    accelerator = Accelerator()\n"
        "    if accelerator.is_main_process:\n"
        "        attempts.value += 1\n"
        "        if attempts.value < 2: raise ValueError('not yet')\n"
        "    accelerator.wait_for_everyone()\n"
        "    accelerator.print('trained after', attempts.value, flush=True)\n"
        f"options = dict(cpu=True, backend={ENGINES[0]!r})\n"
        "notebook_launcher(train, num_processes=2, max_restarts=1, rdzv_backend='c10d', monitor_interval=0.01, **options)\n"
        "def show():\n"
        "    accelerator = Accelerator()\n"
        "    place = accelerator.process_index, accelerator.num_processes, accelerator.local_process_index\n"
        "    places = accelerator.gather_object([place])\n"
        "    if accelerator.is_main_process: print('places', places, flush=True)\n"
        "def machine(rank):\n"
        "    notebook_launcher(show, num_processes=1, num_nodes=2, node_rank=rank, use_port=int(sys.argv[1]), **options)\n"
        "machines = [context.Process(target=machine, args=(rank,)) for rank in range(2)]\n"
        "for one in machines: one.start()\n"
        "for one in machines: one.join()\n"
        "accelerator = Accelerator(cpu=True)\n"
        "for given in (dict(rdzv_endpoint='x'), dict(node_rank=3), dict(num_nodes=2), {}):\n"
        "    try: notebook_launcher(show, num_processes=2, **options, **given)\n"
        "    except Exception as error: print(type(error).__name__, str(error).replace('\\n', ' '))\n"
        "debug_launcher(show)\n",
        tmp_path,
        str(free_port()),
    )
    assert done.returncode == 0, done.stderr
    assert "notebook_launcher: restart 1 of 1, since process 0 of 2 failed" in done.stderr
    assert "trained after 2" in done.stdout
    assert "places [(0, 2, 0), (1, 2, 0)]" in done.stdout
    assert "UnsupportedError notebook_launcher cannot honour rdzv_endpoint='x'" in done.stdout
    assert "LaunchError node_rank=3 is outside a job of 1 machines" in done.stdout
    assert "LaunchError num_nodes=2 with no use_port" in done.stdout
    assert "2 processes cannot be forked from this one: it has an Accelerator" in done.stdout
    assert "places [(0, 2, 0), (1, 2, 1)]" in done.stdout  # tests may


def test_forked_processes_end_with_a_notebook_that_is_killed(tmp_path):
    done = run(
        "import os, pathlib, signal, time\nfrom polyaccel import debug_launcher\n"
        "def train():\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    pathlib.Path('pid' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    if os.environ['RANK'] == '0':\n"
        "        while not pathlib.Path('pid1').exists() or not pathlib.Path('pid1').read_text(): time.sleep(0.01)\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    time.sleep(60)\n"
        f"os.chdir({str(tmp_path)!r})\ndebug_launcher(train)\n",
        tmp_path,
    )  # returns when nobody holds its output any more
    assert done.returncode == -signal.SIGKILL
    assert "the launcher was killed: so are its processes" in done.stderr
    assert all(has_ended((tmp_path / name).read_text()) for name in ("pid0", "pid1"))
