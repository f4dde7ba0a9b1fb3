"""How tests start jobs of several processes, and what those answered; answering.py is the other end.

A plan is a list of [function of the script, its arguments ...]; the answers come in its order.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from launching import with_devices

from polyaccel.launch.rendezvous import Rendezvous

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(script, arguments, *, num_processes, num_devices, timeout=300):
    """What each process of the job said as it left."""
    port = free_port()
    workers = []
    for rank in range(num_processes):
        place = Rendezvous(rank, num_processes, rank, num_processes, "127.0.0.1", port)
        environment = {
            **os.environ,
            **(place.environment() if num_processes > 1 else {}),
            **with_devices(num_devices),
        }
        command = [sys.executable, str(HERE / script), *arguments]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [worker.communicate(timeout=timeout) for worker in workers]
    for worker, (out, err) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, out + err
    lines = [line for out, _ in outputs for line in out.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def answers_of(script, plan, folder, **sizes):
    """Per process the answers of a plan, by the names of its functions."""
    files = start(script, [json.dumps(plan), str(folder)], timeout=900, **sizes)
    everyone = [json.loads(Path(file).read_text()) for file in files]
    return [{name: result for (name, *_), result in zip(plan, results, strict=True)} for results in everyone]
