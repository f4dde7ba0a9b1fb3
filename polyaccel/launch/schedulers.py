"""What each scheduler and launcher tells its processes through the environment: one function per kind, from variables to a Place.

Every function answers None where its variables are absent, and raises LaunchError where they are there but cannot be meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from polyaccel.errors import LaunchError

Environment = Mapping[str, str]
_PORT = 29400  # of process 0, where the scheduler names none


@dataclass(frozen=True, slots=True)
class Place:
    """One process of a job: its number, the job's size, its number on its machine, and where process 0 listens."""

    scheduler: str
    process_index: int
    num_processes: int
    local_process_index: int
    num_local_processes: int
    address: str
    port: int
    is_port_taken: bool = False  # the launcher itself listens there, and torch's processes are its clients


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a job on which `polyaccel launch` runs once each: how many, which one this is, and the first one's address."""

    scheduler: str
    num_machines: int
    machine_rank: int
    address: str | None
    port: int | None


def torchrun(environment: Environment) -> Place | None:
    """torchrun, `polyaccel launch`, `accelerate launch`, Ray Train and Kubeflow's PyTorchJob: RANK, WORLD_SIZE, ..."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise LaunchError(
            f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}",
            "start the job with `polyaccel launch` or torchrun, or unset RANK and WORLD_SIZE for a single process",
        )
    size = _number(environment, "WORLD_SIZE")
    return Place(
        "torchrun",
        _number(environment, "RANK"),
        size,
        _number(environment, "LOCAL_RANK"),
        _number(environment, "LOCAL_WORLD_SIZE", size),
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT"),
        is_port_taken=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def kubeflow_jax(environment: Environment) -> Place | None:
    """Kubeflow Trainer's JAX runtime: JAX_NUM_PROCESSES, JAX_PROCESS_ID, JAX_COORDINATOR_ADDRESS; one process per pod."""
    if "JAX_NUM_PROCESSES" not in environment or "JAX_PROCESS_ID" not in environment:
        return None
    address, port = _address_and_port(environment.get("JAX_COORDINATOR_ADDRESS", ""), _PORT)
    if not address:
        raise LaunchError(
            "JAX_NUM_PROCESSES is set, and JAX_COORDINATOR_ADDRESS is not", "set it to HOST:PORT of process 0"
        )
    port = _number(environment, "JAX_COORDINATOR_PORT", port)
    index, size = _number(environment, "JAX_PROCESS_ID"), _number(environment, "JAX_NUM_PROCESSES")
    return Place("Kubeflow", index, size, 0, 1, address, port)


def slurm(environment: Environment) -> Place | None:
    """A task of srun. The script of sbatch and a shell of salloc are no tasks: they have no step, or a terminal."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PTY_PORT" in environment:
        return None
    size = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", str(size))
    counts = _tasks_per_node(tasks)
    node = _number(environment, "SLURM_NODEID", 0)
    return Place(
        "Slurm",
        _number(environment, "SLURM_PROCID"),
        size,
        _number(environment, "SLURM_LOCALID"),
        counts[node] if node < len(counts) else 1,
        environment.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1",
        _number(environment, "MASTER_PORT", slurm_port(environment)),
    )


def open_mpi(environment: Environment) -> Place | None:
    """mpirun of Open MPI: OMPI_COMM_WORLD_*."""
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    size = _number(environment, "OMPI_COMM_WORLD_SIZE")
    local_size = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    # Open MPI 4 names the machine of mpirun, where rank 0 runs unless a host file says otherwise.
    uri = re.search(r"tcp://([\w.-]+)[,:]", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else uri[1] if uri else "")
    return _mpi(environment, "mpirun", "OMPI_COMM_WORLD_RANK", size, "OMPI_COMM_WORLD_LOCAL_RANK", local_size, address)


def hydra(environment: Environment) -> Place | None:
    """mpiexec of MPICH and Intel MPI: PMI_RANK, PMI_SIZE, MPI_LOCALRANKID."""
    if "PMI_RANK" not in environment or "PMI_SIZE" not in environment:
        return None
    size = _number(environment, "PMI_SIZE")
    local_size = _number(environment, "MPI_LOCALNRANKS", size)
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else "")
    return _mpi(environment, "mpiexec", "PMI_RANK", size, "MPI_LOCALRANKID", local_size, address)


def _mpi(
    environment: Environment, name: str, rank: str, size: int, local_rank: str, local_size: int, address: str
) -> Place | None:
    if size == 1:
        return None
    if not address:
        raise LaunchError(
            f"{name} started {size} processes on several machines and does not say where process 0 is",
            f"pass its address on: {name} -x MASTER_ADDR=HOST ... (mpiexec: -genv MASTER_ADDR HOST)",
        )
    index = _number(environment, rank)
    local_index = _number(environment, local_rank, index)
    return Place(name, index, size, local_index, local_size, address, _number(environment, "MASTER_PORT", _PORT))


def cloud_tpu(environment: Environment) -> Place | None:
    """A TPU slice of several machines: TPU_WORKER_ID and TPU_WORKER_HOSTNAMES; one process per machine."""
    hosts = [host.strip() for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host.strip()]
    if len(hosts) < 2 or "TPU_WORKER_ID" not in environment:
        return None
    index = _number(environment, "TPU_WORKER_ID")
    return Place("Cloud TPU", index, len(hosts), 0, 1, environment.get("MASTER_ADDR") or hosts[0].split(":")[0], _PORT)


def one_per_machine(environment: Environment) -> Place | None:
    """A script that runs once on each machine of SkyPilot or of a Kubernetes Indexed Job, without `polyaccel launch`."""
    machines = machines_of(environment)
    if machines is None or machines.num_machines == 1 or machines.scheduler == "Slurm":
        return None
    if machines.address is None:
        raise LaunchError(
            f"{machines.scheduler} runs this script on {machines.num_machines} machines and does not say where the first one is",
            "set MASTER_ADDR, or use `polyaccel launch --main_process_ip HOST`",
        )
    rank, size = machines.machine_rank, machines.num_machines
    return Place(machines.scheduler, rank, size, 0, 1, machines.address, machines.port or _PORT)


# In order: what a launcher set for this very process goes before what the scheduler around it says.
PLACES: Sequence[Callable[[Environment], Place | None]] = (
    torchrun,
    kubeflow_jax,
    open_mpi,
    hydra,
    slurm,
    cloud_tpu,
    one_per_machine,
)


def machines_of(environment: Environment) -> Machines | None:
    """The machines that a scheduler started `polyaccel launch` on, once each; None where it runs on this machine alone."""
    address = environment.get("MASTER_ADDR")
    if "PET_NNODES" in environment and "PET_NODE_RANK" in environment:  # Kubeflow Trainer, torchrun's own variables
        return Machines(
            "Kubeflow",
            _number(environment, "PET_NNODES"),
            _number(environment, "PET_NODE_RANK"),
            environment.get("PET_MASTER_ADDR", address),
            _number(environment, "PET_MASTER_PORT", _PORT),
        )
    if "JAX_NUM_PROCESSES" in environment and "JAX_PROCESS_ID" in environment:  # Kubeflow Trainer, the JAX runtime
        place = kubeflow_jax(environment)
        assert place is not None  # it has just seen its variables
        return Machines("Kubeflow", place.num_processes, place.process_index, place.address, place.port)
    if "SKYPILOT_NODE_RANK" in environment:
        hosts = environment.get("SKYPILOT_NODE_IPS", "").split()
        count = _number(environment, "SKYPILOT_NUM_NODES", len(hosts) or 1)
        first = address or (hosts[0] if hosts else None)
        return Machines("SkyPilot", count, _number(environment, "SKYPILOT_NODE_RANK"), first, _PORT)
    if "JOB_COMPLETION_INDEX" in environment and "NUM_MACHINES" in environment:
        count, rank = _number(environment, "NUM_MACHINES"), _number(environment, "JOB_COMPLETION_INDEX")
        return Machines("Kubernetes", count, rank, address, _number(environment, "MASTER_PORT", _PORT))
    if "SLURM_STEP_ID" in environment and "SLURM_NNODES" in environment and "SLURM_PTY_PORT" not in environment:
        count = _number(environment, "SLURM_NNODES")
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS", count)
        if tasks != count:
            raise LaunchError(
                f"srun started {tasks} tasks on {count} nodes, and each runs `polyaccel launch`, which starts a node's processes itself",
                "use srun --ntasks-per-node=1 with `polyaccel launch`, or let srun start the script (python train.py)",
            )
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        rank = _number(environment, "SLURM_NODEID", 0)
        return Machines("Slurm", count, rank, address or first_host(nodes), slurm_port(environment))
    return None


def first_host(nodes: str) -> str:
    """The first name of Slurm's compressed list: `node[07-09,12],login` is node07. Empty for an empty list."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,]*)", nodes)
    if not match:
        return ""
    prefix, numbers, suffix = match.groups()
    return f"{prefix}{re.split('[-,]', numbers)[0] if numbers else ''}{suffix}"


def slurm_port(environment: Environment) -> int:
    """A port that every task of a job agrees on, and that two jobs on one machine are unlikely to share."""
    return 20000 + _number(environment, "SLURM_JOB_ID", 0) % 20000


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _address_and_port(text: str, default: int) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    return (address, int(port)) if address and port.isdigit() else (text, default)


def _number(environment: Environment, name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"{name}={text!r} is not a number", "set it to an integer, or unset it") from None
