"""Every file and folder name of a checkpoint: how it is made, and what it may look like when it is read."""

from __future__ import annotations

import re

from polyaccel.errors import CheckpointError

MANIFEST = "manifest.json"
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DATA_FILE = re.compile(r"[a-z][a-z0-9_]{0,63}(\.\d{5,}-of-\d{5,})?\.safetensors")
_PART = re.compile(r"part-(\d{5,})\.json")
_CHECKPOINT = re.compile(r"checkpoint_(0|[1-9]\d{0,17})")
_LOCK = re.compile(r"\.(?P<target>.+)\.lock", re.DOTALL)
# A sibling of the checkpoint: written to, put aside for a newer one, or about to be deleted.
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.(?P<state>saving|replaced|deleted)", re.DOTALL)


def is_group(name: str) -> bool:
    """Whether a group of that name can have a file."""
    return _GROUP.fullmatch(name) is not None


def check_group(name: str) -> None:
    """Raises CheckpointError for a name that no group can have."""
    if not is_group(name):
        raise CheckpointError(
            f"a group of arrays cannot be called {name!r}",
            "use a small letter, then small letters, digits and '_', at most 64",
        )


def data_file(group: str, process_index: int, num_processes: int) -> str:
    """`model.safetensors`, or `model.00001-of-00004.safetensors` where several processes write."""
    if num_processes == 1:
        return f"{group}.safetensors"
    return f"{group}.{process_index + 1:05d}-of-{num_processes:05d}.safetensors"


def part_file(process_index: int) -> str:
    """Where a process says which files it has written."""
    return f"part-{process_index:05d}.json"


def is_part(name: str) -> bool:
    """Whether it is the part of some process."""
    return _PART.fullmatch(name) is not None


def is_data_file(name: str) -> bool:
    """Whether arrays may be in a file of that name."""
    return _DATA_FILE.fullmatch(name) is not None


def is_safe(path: str) -> bool:
    """Whether a relative path names something inside the folder, whatever the file system makes of it."""
    parts = path.split("/")
    return (
        0 < len(path) <= 1024
        and all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 255 for part in parts)
        and not any(character < " " or character in "\\\x7f" for character in path)
    )


def checkpoint_name(iteration: int) -> str:
    """The folder name of an automatically named checkpoint."""
    return f"checkpoint_{iteration}"


def checkpoint_number(name: str) -> int | None:
    """The iteration in an automatic name, None for any other name."""
    found = _CHECKPOINT.fullmatch(name)
    return int(found[1]) if found else None


def leftover_name(target: str, attempt: str, state: str) -> str:
    """The hidden sibling of checkpoint `target` in this state: "saving", "replaced" or "deleted"."""
    return f".{target}.{attempt}.{state}"


def lock_name(target: str) -> str:
    """The hidden sibling that is locked while checkpoint `target` is written."""
    return f".{target}.lock"


def read_lock(name: str) -> str | None:
    """The checkpoint whose lock has this name, None for any other name."""
    found = _LOCK.fullmatch(name)
    return found["target"] if found else None


def read_leftover(name: str) -> tuple[str, str] | None:
    """(the checkpoint's name, the state) of a hidden sibling, None for any other name."""
    found = _LEFTOVER.fullmatch(name)
    return (found["target"], found["state"]) if found else None
