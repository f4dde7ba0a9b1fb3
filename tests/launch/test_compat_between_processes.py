"""Accelerate's operations between two processes, in torch scripts on each engine. Each case is a process of its own, which forks two."""

import importlib.util
import subprocess
import sys

import pytest

from polyaccel.registry import load_backend

HAS_BRIDGES = all(importlib.util.find_spec(name) for name in ("torch", "jax"))
ENGINES = [name for name in ("torch", "jax") if load_backend(name).probe().is_usable]

SCRIPT = """
import random
import sys
from polyaccel import notebook_launcher

def main():
    import torch
    from polyaccel import PartialState
    from polyaccel.state import AcceleratorState
    from polyaccel.utils import (
        DistributedType, broadcast, broadcast_object_list, copy_tensor_to_devices, gather, gather_object,
        pad_across_processes, reduce, synchronize_rng_states,
    )

    state = PartialState()
    me = state.process_index
    assert (state.num_processes, state.is_last_process, state.use_distributed) == (2, me == 1, True)
    assert state.distributed_type == DistributedType.MULTI_CPU
    mine = torch.tensor([1.0 + me, 3.0])

    assert gather({"a": mine})["a"].tolist() == [1.0, 3.0, 2.0, 3.0]
    assert gather_object([me, "x"]) == [0, "x", 1, "x"]
    assert reduce(mine).tolist() == [1.5, 3.0]
    assert reduce(mine, "sum", scale=2.0).tolist() == [6.0, 12.0]
    assert reduce(mine, "max").tolist() == [2.0, 3.0]
    assert mine.tolist() == [1.0 + me, 3.0]
    padded = pad_across_processes(torch.ones(1 + me), pad_index=7, pad_first=True)
    assert padded.tolist() == ([7.0, 1.0] if me == 0 else [1.0, 1.0])

    taken = mine.clone()
    assert broadcast([taken], from_process=1)[0] is taken  # in place, as scripts that ignore the result rely on
    assert taken.tolist() == [2.0, 3.0]
    assert broadcast_object_list([me, "of", me]) == [0, "of", 0]
    found = copy_tensor_to_devices(torch.arange(6).reshape(2, 3) if me == 1 else None)
    assert (found.tolist(), found.dtype) == ([[0, 1, 2], [3, 4, 5]], torch.int64)

    random.seed(me), torch.manual_seed(me)
    generator = torch.Generator().manual_seed(me)
    synchronize_rng_states(["python", "torch", "generator"], generator)
    drawn = gather_object([[random.random(), torch.rand(1).item(), torch.rand(1, generator=generator).item()]])
    assert drawn[0] == drawn[1]

    with state.split_between_processes([1, 2, 3]) as share:
        assert share == [[1, 2], [3]][me]
    assert state.on_last_process(lambda: "last")() == ("last" if me else None)
    state.wait_for_everyone()
    sys.stdout.write(f"process {me} agrees\\n")  # in one piece: the other process writes at the same time

notebook_launcher(main, num_processes=2, cpu=True, backend=BACKEND, mixed_precision="no")
"""


@pytest.mark.parametrize("backend", [name for name in ENGINES if name == "torch" or HAS_BRIDGES])
def test_two_processes_agree_without_an_accelerator_of_their_own(backend, tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(SCRIPT.replace("BACKEND", repr(backend)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if "agrees" in line) == [
        "process 0 agrees",
        "process 1 agrees",
    ]
