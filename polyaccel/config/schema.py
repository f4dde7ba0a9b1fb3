"""The settings, one field each: name, type, default, meaning. There is no second place where a setting is declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from polyaccel.mesh import MeshSpec
from polyaccel.precision import MIXED_PRECISIONS, LossScaling, PrecisionPolicy
from polyaccel.sharding.rules import ShardingRule

PARTITIONINGS = ("auto", "pmap", "sharding")
TARGETS = ("local", "slurm", "tpu-pod", "kubernetes", "ray", "hosts")
REMATS = ("none", "full", "dots")
OFFLOADS = ("none", "cpu")
PREEMPTIONS = ("off", "save")
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the exit code of a process that saved its state and wants to be continued
COMM_HOOKS = ("no", "fp16", "bf16", "power_sgd", "batched_power_sgd")
RNG_TYPES = ("python", "numpy", "generator", "torch", "cuda", "xla", "jax")


def _setting(
    default: Any,
    help: str,
    *,
    kind: str | None = None,
    choices: tuple[str, ...] = (),
    least: int = 0,
    reads: Callable[[str], Any] | None = None,
) -> Any:
    """A field that is a setting. `kind` is needed where the default is None; `choices` and `least` bound the value, and `reads` raises
    ConfigError for an item of a list that means nothing."""
    metadata = {"help": help, "kind": kind, "choices": choices, "least": least, "reads": reads}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), hash=False, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Config:
    """The resolved settings of one Accelerator. `sources[name]` says where a value that is no default came from, `remarks` what of the
    script's settings has no effect."""

    backend: str = _setting("auto", "engine: torch, xla, jax, or auto (the one whose framework is loaded)")
    mixed_precision: str = _setting("no", "no, bf16 or fp16", choices=MIXED_PRECISIONS)
    autocast: bool = _setting(
        True, "prepared models compute in the mixed precision; false: in the dtype of their parameters"
    )
    autocast_cache: bool = _setting(True, "torch: a weight is cast once per forward pass, not at each use")
    loss_scaling: bool = _setting(True, "fp16: scale the loss, and skip updates whose gradients are not finite")
    loss_scaling_init_scale: float = _setting(65536.0, "fp16: the scale of the first step")
    loss_scaling_growth_factor: float = _setting(2.0, "fp16: what the scale is multiplied by after enough good steps")
    loss_scaling_backoff_factor: float = _setting(0.5, "fp16: what the scale is multiplied by after a skipped step")
    loss_scaling_growth_interval: int = _setting(2000, "fp16: good steps in a row before the scale grows", least=1)
    gradient_accumulation_steps: int = _setting(1, "batches per optimizer update", least=1)
    micro_batches_per_update: int | None = _setting(
        None,
        "batches per optimizer update of all data shards together: gradient_accumulation_steps follows from the data shards that there"
        " are, so that a job resumed on fewer or more devices keeps its global batch",
        kind="int",
        least=1,
    )
    adjust_scheduler: bool = _setting(
        True, "a scheduler counts the batches on which it is not stepped, as torch's check of the order expects"
    )
    sync_with_dataloader: bool = _setting(True, "a loader's last batch closes its accumulation window, however full")
    sync_each_batch: bool = _setting(
        False, "exchange gradients after every batch of a window: more communication, less memory"
    )
    mesh: MeshSpec = field(default_factory=MeshSpec)
    sharding_rules: tuple[str, ...] = _setting(
        (),
        "how parameters are cut, by name: '*.q_proj.weight=tensor -', one axis or - per dim, or whole; the first match counts",
        reads=ShardingRule.of,
    )
    remat: Literal["none", "full", "dots"] = _setting(
        "none",
        "what a backward pass computes again instead of keeping it: none: nothing; full: the layers of every block; dots: all but products"
        " with weights",
        choices=REMATS,
    )
    offload: Literal["none", "cpu"] = _setting(
        "none",
        "where the parts of parameters, gradients and optimizer state that mesh.fsdp makes rest between uses: none: on their devices;"
        " cpu: in host memory",
        choices=OFFLOADS,
    )
    split_batches: bool = _setting(False, "a loader's batch_size is the global batch, cut over the data shards")
    even_batches: bool = _setting(
        True, "complete the last global batch from the first samples, so that all shards agree"
    )
    dispatch_batches: bool | None = _setting(
        None,
        "process 0 alone reads, and sends every process its part (default: where the data asks for it)",
        kind="bool",
    )
    use_seedable_sampler: bool = _setting(False, "an epoch's order follows from data_seed and the epoch's number alone")
    data_seed: int | None = _setting(None, "seed of use_seedable_sampler (default: that of set_seed)", kind="int")
    use_stateful_dataloader: bool = _setting(False, "torch loaders are torchdata's StatefulDataLoader")
    non_blocking: bool = _setting(False, "copies of batches to the device do not wait for each other")
    prefetch_batches: int = _setting(2, "batches on their way to the device while one is used")
    read_in_background: bool = _setting(
        False,
        "a thread reads the batches ahead; refused for loaders that draw random numbers of the script while they read",
    )
    device_placement: bool = _setting(True, "prepare moves models and batches to the process's device")
    cpu: bool = _setting(False, "use the CPU even where an accelerator is present")
    rng_types: tuple[str, ...] = _setting(
        ("generator",), "random generators that every process takes from process 0 at each epoch", choices=RNG_TYPES
    )
    tail_window: Literal["full", "actual"] = _setting(
        "full",
        "the last accumulation window of a loader, when it is short: full: its gradients are divided by gradient_accumulation_steps, as"
        " Accelerate does; actual: by the batches that it has",
        choices=("full", "actual"),
    )
    scheduler_unit: Literal["sample", "step"] = _setting(
        "sample",
        "what moves a scheduler: sample: each data shard's batch, so an update is as many steps as data shards (one with split_batches),"
        " as in Accelerate; step: each update",
        choices=("sample", "step"),
    )
    step_scheduler_with_optimizer: bool = _setting(
        True, "scheduler.step() follows optimizer updates; false: every call is one step"
    )
    partitioning: Literal["auto", "pmap", "sharding"] = _setting(
        "auto",
        "jax: replica programs (pmap) or one global program (sharding); auto: pmap for torch, sharding for flax",
        choices=PARTITIONINGS,
    )
    compile: bool = _setting(False, "torch: torch.compile the prepared model")
    compile_backend: str = _setting("inductor", "torch: the torch.compile backend")
    compile_mode: str = _setting(
        "default", "torch: default, reduce-overhead, max-autotune, or another mode of torch.compile"
    )
    compile_fullgraph: bool = _setting(False, "torch: refuse a model that torch.compile cannot take as one graph")
    compile_dynamic: bool | None = _setting(
        None, "torch: compile for changing shapes, or for each (default: torch finds out)", kind="bool"
    )
    compile_options: Mapping[str, Any] = _setting({}, "torch: options of the torch.compile backend, in place of a mode")
    compile_regions: bool = _setting(
        False, "torch: compile the blocks of a model that repeat, and the rest, each for itself: a faster first step"
    )
    ddp_broadcast_buffers: bool = _setting(True, "torch: every forward pass begins with the buffers of process 0")
    ddp_bucket_cap_mb: int = _setting(25, "torch: megabytes of gradients that are exchanged together", least=1)
    ddp_find_unused_parameters: bool = _setting(False, "torch: look for parameters that a loss does not depend on")
    ddp_gradient_as_bucket_view: bool = _setting(True, "torch: gradients live in the memory that is exchanged, once")
    ddp_static_graph: bool = _setting(False, "torch: every step uses the same parameters in the same order")
    ddp_comm_hook: str = _setting("no", "torch: how gradients are compressed for their exchange", choices=COMM_HOOKS)
    ddp_comm_wrapper: str = _setting("no", "torch: a cast around that compression", choices=COMM_HOOKS[:3])
    ddp_comm_state_option: Mapping[str, Any] = _setting(
        {}, "torch: options of PowerSGD, such as matrix_approximation_rank"
    )
    process_group: str = _setting(
        "auto",
        "torch: the torch.distributed backend; auto: nccl on GPUs, gloo on CPUs",
        choices=("auto", "gloo", "nccl"),
    )
    compilation_cache: str = _setting(
        "auto", "jax, xla: folder of the persistent compilation cache; auto: the user's cache folder; off"
    )
    blocking_saves: bool = _setting(
        False,
        "save_state returns when the checkpoint is complete on the disk, as Accelerate's does; false: when it is copied",
    )
    preemption: Literal["off", "save"] = _setting(
        "off",
        f"on SIGTERM or SIGUSR1, save: all processes save the same step and leave with exit code {PREEMPTED}; off: nothing is changed",
        choices=PREEMPTIONS,
    )
    debug: bool = _setting(
        False, "before each collective of the script, compare calls, shapes and dtypes of all processes (slower)"
    )
    seed: int = _setting(0, "seed of the engine's random stream until set_seed is called")
    record: str = _setting(
        "", "new folder where losses, gradient norms and parameters are recorded, for `polyaccel compare`"
    )
    record_steps: int = _setting(0, "with record: end the script after so many updates; 0: where it ends by itself")
    timeout_s: int = _setting(
        1800, "seconds that a process waits for the others in an exchange, before an error says who is missing", least=1
    )
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def precision(self) -> PrecisionPolicy:
        """The policy that `mixed_precision` names, with its settings."""
        scaling = LossScaling(
            init_scale=self.loss_scaling_init_scale,
            growth_factor=self.loss_scaling_growth_factor,
            backoff_factor=self.loss_scaling_backoff_factor,
            growth_interval=self.loss_scaling_growth_interval,
        )
        return PrecisionPolicy.of(self.mixed_precision, scaling if self.loss_scaling else None, autocast=self.autocast)

    @property
    def parameter_rules(self) -> tuple[ShardingRule, ...]:
        """What `sharding_rules` say. Raises ConfigError for a text that is no rule."""
        return tuple(ShardingRule.of(text) for text in self.sharding_rules)


MESH_HELP = {
    "replica": "data-parallel copies of the whole mesh (over slower links)",
    "data": "data-parallel replicas; -1: all devices that the other axes leave",
    "fsdp": "devices over which parameters are sharded, and the batch with them",
    "tensor": "devices over which single layers are split",
    "sequence": "devices over which sequences are split",
}


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How `polyaccel launch` starts a job: the `[launch]` table of a config file. Workers do not read it."""

    on: str = _setting("local", "where: local, slurm, tpu-pod, kubernetes, ray, hosts", choices=TARGETS)
    num_processes: int | None = _setting(
        None,
        "processes of the whole job, over all machines (default: what the backend wants: torch one per GPU, xla and jax one"
        " per machine)",
        kind="int",
        least=1,
    )
    num_machines: int = _setting(1, "machines of the job", least=1)
    machine_rank: int = _setting(0, "this machine, from 0")
    main_process_ip: str | None = _setting(None, "address of machine 0", kind="str")
    main_process_port: int | None = _setting(None, "free port on machine 0 (default: chosen)", kind="int", least=1)
    max_restarts: int = _setting(
        0, "how often the whole job is started again after a process failed or a machine was lost"
    )
    min_machines: int | None = _setting(
        None,
        "machines that are enough to go on after one was lost (default: all); needs micro_batches_per_update",
        kind="int",
        least=1,
    )
    join_timeout_s: int = _setting(
        600, "seconds that the machines wait for each other, at the start and after one was lost", least=1
    )
    heartbeat_timeout_s: int = _setting(30, "seconds without a sign of life after which a machine is lost", least=1)
    grace_s: int = _setting(15, "seconds between SIGTERM and SIGKILL when processes are stopped", least=1)
    gpu_ids: str = _setting("all", "GPUs of this machine, such as 0,1, or all")
    num_cpu_threads_per_process: int | None = _setting(
        None,
        "OMP_NUM_THREADS of every process (default: the variable as it is, else cores / processes where there are several)",
        kind="int",
        least=1,
    )


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """What `polyaccel launch --on slurm` writes at the top of its sbatch script: the `[slurm]` table."""

    job_name: str = _setting("polyaccel", "name of the job")
    partition: str | None = _setting(None, "partition", kind="str")
    account: str | None = _setting(None, "account", kind="str")
    qos: str | None = _setting(None, "quality of service", kind="str")
    constraint: str | None = _setting(None, "features that the nodes must have", kind="str")
    time: str | None = _setting(None, "time limit, such as 04:00:00", kind="str")
    gpus_per_node: int | None = _setting(None, "GPUs of every node", kind="int", least=1)
    cpus_per_task: int | None = _setting(None, "cores of every node's task", kind="int", least=1)
    mem: str | None = _setting(None, "memory of every node, such as 64G", kind="str")
    output: str = _setting("slurm-%j.out", "where the job's output goes")
    requeue: bool = _setting(True, "queue the job again when a preempted script has saved its state and left")
    setup: str | None = _setting(
        None, "a shell command that every node runs first, such as `source env/bin/activate`", kind="str"
    )


@dataclass(frozen=True, slots=True)
class TpuPodSettings:
    """Which TPU `polyaccel launch --on tpu-pod` reaches through gcloud: the `[tpu_pod]` table."""

    name: str | None = _setting(None, "name of the TPU VM", kind="str")
    zone: str | None = _setting(None, "its zone (default: gcloud's own)", kind="str")
    project: str | None = _setting(None, "its project (default: gcloud's own)", kind="str")
    workdir: str | None = _setting(None, "folder on every worker in which the script is started", kind="str")
    setup: str | None = _setting(None, "a shell command that every worker runs first", kind="str")


@dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """The manifest of `polyaccel launch --on kubernetes`: the `[kubernetes]` table."""

    name: str = _setting("polyaccel", "name of the job")
    namespace: str = _setting("default", "namespace")
    image: str | None = _setting(None, "container image with polyaccel, the engine and the script", kind="str")
    kind: str = _setting("jobset", "jobset, or trainjob (Kubeflow Trainer)", choices=("jobset", "trainjob"))
    runtime: str | None = _setting(
        None, "trainjob: the ClusterTrainingRuntime (default: torch-distributed or jax-distributed)", kind="str"
    )
    gpus_per_node: int | None = _setting(None, "nvidia.com/gpu of every machine", kind="int", least=1)
    tpus_per_node: int | None = _setting(None, "google.com/tpu of every machine", kind="int", least=1)
    tpu_accelerator: str | None = _setting(None, "GKE's TPU type, such as tpu-v5-lite-podslice", kind="str")
    tpu_topology: str | None = _setting(None, "GKE's TPU topology, such as 4x4", kind="str")
    cpu: str | None = _setting(None, "cores of every machine", kind="str")
    memory: str | None = _setting(None, "memory of every machine, such as 64Gi", kind="str")


@dataclass(frozen=True, slots=True)
class RaySettings:
    """The Ray cluster of `polyaccel launch --on ray`: the `[ray]` table."""

    address: str = _setting("auto", "the cluster; auto: the one that runs here; local: one for this job alone")
    cpus_per_machine: int = _setting(1, "CPUs that the job takes of every machine", least=1)
    gpus_per_machine: int = _setting(0, "GPUs that the job takes of every machine")
    tpus_per_machine: int = _setting(0, "TPU chips that the job takes of every machine")
    share_machines: bool = _setting(False, "let several of the job's machines be one, to try things out")
    wait_s: int = _setting(300, "seconds to wait for room in the cluster", least=1)


@dataclass(frozen=True, slots=True)
class HostSettings:
    """Plain machines that `polyaccel launch --on hosts` reaches by ssh: the `[hosts]` table."""

    names: tuple[str, ...] = _setting((), "the machines as ssh knows them; the first one is machine 0")
    workdir: str | None = _setting(None, "folder on every machine in which the script is started", kind="str")
    setup: str | None = _setting(None, "a shell command that every machine runs first", kind="str")


SECTIONS: Mapping[str, type] = {
    "launch": LaunchSettings,
    "slurm": SlurmSettings,
    "tpu_pod": TpuPodSettings,
    "kubernetes": KubernetesSettings,
    "ray": RaySettings,
    "hosts": HostSettings,
}
