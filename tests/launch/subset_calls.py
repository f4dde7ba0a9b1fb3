"""Run by test_subset_calls.py: jobs of two processes that do not come to the same collectives. Prints as JSON what they failed with."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from polyaccel import Accelerator, collective_calls, debug_launcher
from polyaccel.errors import CollectiveError

FOLDER = Path(sys.argv[1])


def training():
    accelerator = Accelerator()
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step():
        accelerator.backward(model(torch.ones(4, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
        return float(next(iter(model.parameters())).detach().sum())

    return accelerator, step


def different_calls():
    accelerator = Accelerator()
    own = accelerator.is_main_process
    pairs = {
        ("gather_object", "check_trigger"): lambda: (
            accelerator.gather_object([1]) if own else accelerator.check_trigger()
        ),
        ("save_state", "load_state"): lambda: (accelerator.save_state if own else accelerator.load_state)(
            str(FOLDER / "c")
        ),
        ("wait_for_everyone", "broadcast_object_list"): lambda: (
            accelerator.wait_for_everyone() if own else accelerator.broadcast_object_list([2])
        ),
        ("prepare", "main_process_first"): lambda: (
            accelerator.prepare(nn.Linear(1, 1)) if own else accelerator.main_process_first().__enter__()
        ),
    }
    for (mine, other), call in pairs.items():
        with pytest.raises(CollectiveError) as caught:
            call()
        text = str(caught.value)
        assert f"process 0: {mine} at" in text, text
        assert f"process 1: {other} at" in text, text
        assert text.count("subset_calls.py:") == 2, text
    assert accelerator.gather_object([accelerator.process_index]) == [0, 1]  # and the job goes on


def on_the_main_process_only():
    collective_calls._STUCK_S = 1.0
    accelerator, step = training()
    for _ in range(3):
        step()
        if accelerator.is_main_process:
            accelerator.gather(torch.ones(2))


def saved_before_the_other_left():
    accelerator, step = training()
    step()
    if accelerator.is_main_process:
        accelerator.save_state(str(FOLDER / "d"))
    accelerator.end_training()


def the_other_has_ended():
    accelerator = Accelerator()
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()


def slow_and_too_slow():
    os.environ["POLYACCEL_TIMEOUT_S"] = "2"
    accelerator = Accelerator()
    for pause_s in (1.2, 4.0):
        if not accelerator.is_main_process:
            time.sleep(pause_s)
        accelerator.wait_for_everyone()
        accelerator.print(f"waited {pause_s:g} s", flush=True)


JOBS = (different_calls, on_the_main_process_only, saved_before_the_other_left, the_other_has_ended, slow_and_too_slow)

if __name__ == "__main__":
    if os.environ["POLYACCEL_BACKEND"] == "jax":
        import polyaccel_bridges.torch_to_jax  # noqa: F401  (once, before the processes are forked)
        import polyaccel_jax.engine  # noqa: F401
    else:
        import polyaccel_torch.engine  # noqa: F401
    said = {}
    for job in JOBS:
        started = time.monotonic()
        try:
            debug_launcher(job)
            said[job.__name__] = "nothing"
        except RuntimeError as error:
            said[job.__name__] = str(error)
        said[f"{job.__name__} took"] = time.monotonic() - started
    print("\n" + json.dumps(said))
