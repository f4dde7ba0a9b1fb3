"""Each scheduler's own variables become one Rendezvous, so that the same script runs under any of them."""

import pytest

from polyaccel.errors import LaunchError
from polyaccel.launch.rendezvous import Rendezvous, from_environment, machines_from_environment
from polyaccel.launch.schedulers import first_host

SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SRUN, Rendezvous(5, 8, 1, 4, "gpu07", 24242)),
        ({**SRUN, "MASTER_ADDR": "ib0.gpu07", "MASTER_PORT": "1234"}, Rendezvous(5, 8, 1, 4, "ib0.gpu07", 1234)),
        (MPIRUN, Rendezvous(1, 2, 1, 2, "127.0.0.1", 29400)),
        (
            {
                **MPIRUN,
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "OMPI_MCA_orte_hnp_uri": "123.0;tcp://10.1.2.3,10.9.9.9:4711",
            },
            Rendezvous(1, 2, 1, 1, "10.1.2.3", 29400),
        ),
        (
            {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "h"},
            Rendezvous(3, 4, 1, 2, "h", 29400),
        ),
        (
            {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "job-0.svc:6666"},
            Rendezvous(2, 4, 0, 1, "job-0.svc", 6666),
        ),
        (
            {
                "JAX_NUM_PROCESSES": "4",
                "JAX_PROCESS_ID": "2",
                "JAX_COORDINATOR_ADDRESS": "j",
                "JAX_COORDINATOR_PORT": "7",
            },
            Rendezvous(2, 4, 0, 1, "j", 7),
        ),
        ({"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t0,t1"}, Rendezvous(1, 2, 0, 1, "t0", 29400)),
        (
            {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"},
            Rendezvous(1, 2, 0, 1, "10.0.0.1", 29400),
        ),
        (
            {"JOB_COMPLETION_INDEX": "1", "NUM_MACHINES": "2", "MASTER_ADDR": "job-0", "MASTER_PORT": "5"},
            Rendezvous(1, 2, 0, 1, "job-0", 5),
        ),
    ],
    ids=[
        "srun",
        "srun with an address",
        "mpirun",
        "mpirun on machines",
        "mpiexec",
        "kubeflow",
        "kubeflow port",
        "tpu",
        "sky",
        "k8s",
    ],
)
def test_a_process_finds_its_place(environment, place):
    assert from_environment(environment) == place


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # the script of sbatch itself
        {**SRUN, "SLURM_PTY_PORT": "1"},  # srun --pty bash
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},  # a single machine
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "1"},
        {"JOB_COMPLETION_INDEX": "1"},  # an Indexed Job whose pods are no job of processes
    ],
)
def test_a_single_process_stays_one(environment):
    assert from_environment(environment) == Rendezvous()


def test_what_a_launcher_set_goes_before_its_scheduler():
    inner = Rendezvous(1, 2, 1, 2, "127.0.0.1", 29500)
    assert from_environment({**SRUN, **inner.environment()}) == inner


def test_an_engine_with_a_server_of_its_own_keeps_away_from_torchruns_agent():
    environment = Rendezvous(0, 2, 0, 2, "127.0.0.1", 29500).environment()
    assert from_environment(environment).coordinator_port == 29500
    assert from_environment({**environment, "TORCHELASTIC_USE_AGENT_STORE": "True"}).coordinator_port == 29501


def test_several_machines_without_an_address_are_refused_with_the_way_out():
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=HOST"):
        from_environment({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    with pytest.raises(LaunchError, match=r"Kubernetes runs this script on 2 machines"):
        from_environment({"JOB_COMPLETION_INDEX": "1", "NUM_MACHINES": "2"})
    with pytest.raises(LaunchError, match=r"JAX_COORDINATOR_ADDRESS is not"):
        from_environment({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("node[07-09,12],login", "node07"), ("a,b", "a"), ("n[3,5]-ib", "n3-ib"), ("", "")],
)
def test_the_first_name_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_the_launcher_finds_the_machines_that_it_was_started_on():
    kubeflow = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "m", "PET_MASTER_PORT": "9"}
    found = machines_from_environment(kubeflow)
    assert (found.scheduler, found.num_machines, found.machine_rank, found.address, found.port) == (
        "Kubeflow",
        2,
        1,
        "m",
        9,
    )
    found = machines_from_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "2"})
    assert (found.scheduler, found.num_machines, found.machine_rank, found.address, found.port) == (
        "Slurm",
        2,
        1,
        "gpu07",
        24242,
    )
    assert machines_from_environment({}) is None
    assert machines_from_environment({name: v for name, v in SRUN.items() if name != "SLURM_STEP_ID"}) is None
    with pytest.raises(LaunchError, match="8 tasks on 2 nodes"):
        machines_from_environment(SRUN)
