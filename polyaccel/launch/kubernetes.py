"""A job as a Kubernetes manifest: a JobSet of one Indexed Job, or a TrainJob of Kubeflow Trainer."""

from __future__ import annotations

import re
from typing import Any

from polyaccel.config.schema import KubernetesSettings
from polyaccel.errors import LaunchError
from polyaccel.launch.cluster import Job, run_tool

_PORT = 29400
_WORKERS = "workers"
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?")  # a pod's name adds up to 15 characters to it


def manifest(job: Job, kubernetes: KubernetesSettings, *, backend: str) -> dict[str, Any]:
    """The manifest as a tree. Raises LaunchError for a name that Kubernetes refuses, or where the image is missing."""
    if kubernetes.image is None:
        raise LaunchError(
            "--kubernetes.image is not given", "name a container image that holds polyaccel, the engine and the script"
        )
    if not _DNS_LABEL.fullmatch(kubernetes.name):
        raise LaunchError(
            f"--kubernetes.name {kubernetes.name!r} is no name of a Kubernetes object",
            "use at most 48 lower-case letters, digits and dashes",
        )
    build = _train_job if kubernetes.kind == "trainjob" else _job_set
    return build(job, kubernetes, backend)


def text(tree: dict[str, Any]) -> str:
    """The manifest as YAML."""
    import yaml

    return str(yaml.safe_dump(tree, sort_keys=False, width=1000))


def apply(tree: dict[str, Any]) -> str:
    """Give the manifest to kubectl; returns its answer. Raises LaunchError with kubectl's own words."""
    return run_tool(
        ["kubectl", "apply", "-f", "-"],
        stdin=text(tree),
        cure="run this where kubectl is installed, or print the manifest with --emit",
    ).strip()


def _job_set(job: Job, kubernetes: KubernetesSettings, backend: str) -> dict[str, Any]:
    count = job.settings.num_machines
    container = {
        "name": "main",
        "image": kubernetes.image,
        "command": job.launch_command(without=["launch.max_restarts"]),  # the JobSet restarts
        # Kubernetes itself adds JOB_COMPLETION_INDEX; a pod's host name is JOBSET-GROUP-JOB-POD, its domain the JobSet's name.
        "env": [
            {"name": "NUM_MACHINES", "value": str(count)},
            {"name": "MASTER_ADDR", "value": f"{kubernetes.name}-{_WORKERS}-0-0.{kubernetes.name}"},
            {"name": "MASTER_PORT", "value": str(_PORT)},
        ],
        **_resources(kubernetes),
    }
    pod: dict[str, Any] = {"restartPolicy": "Never", "containers": [container]}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": kubernetes.tpu_accelerator,
        "cloud.google.com/gke-tpu-topology": kubernetes.tpu_topology,
    }
    if any(selector.values()):
        pod["nodeSelector"] = {label: value for label, value in selector.items() if value}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": kubernetes.name, "namespace": kubernetes.namespace},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.settings.max_restarts},
            "replicatedJobs": [
                {
                    "name": _WORKERS,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": count,
                            "parallelism": count,
                            "backoffLimit": 0,  # one lost machine ends the job, and the JobSet starts all of it again
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def _train_job(job: Job, kubernetes: KubernetesSettings, backend: str) -> dict[str, Any]:
    runtime = kubernetes.runtime or ("jax-distributed" if backend == "jax" else "torch-distributed")
    resources = _resources(kubernetes)
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": kubernetes.name, "namespace": kubernetes.namespace},
        "spec": {
            "runtimeRef": {"name": runtime},
            "trainer": {
                "numNodes": job.settings.num_machines,
                "image": kubernetes.image,
                "command": job.launch_command(),
                **({"resourcesPerNode": resources["resources"]} if resources else {}),
            },
        },
    }


def _resources(kubernetes: KubernetesSettings) -> dict[str, Any]:
    amounts = {
        "nvidia.com/gpu": kubernetes.gpus_per_node,
        "google.com/tpu": kubernetes.tpus_per_node,
        "cpu": kubernetes.cpu,
        "memory": kubernetes.memory,
    }
    given = {name: str(amount) for name, amount in amounts.items() if amount is not None}
    return {"resources": {"requests": given, "limits": given.copy()}} if given else {}
