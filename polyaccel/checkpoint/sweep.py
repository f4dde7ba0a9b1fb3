"""Removes what is not needed: leftovers of writers that died, and checkpoints beyond the limit, only after a newer one is complete."""

from __future__ import annotations

import secrets

from polyaccel.checkpoint import names
from polyaccel.checkpoint.documents import Malformed
from polyaccel.checkpoint.lock import is_being_written, lock_target
from polyaccel.checkpoint.newest import numbered
from polyaccel.checkpoint.read import open_checkpoint
from polyaccel.checkpoint.storage import Folder, Location, explained, open_folder
from polyaccel.errors import CheckpointError


def sweep(folder: Location) -> list[str]:
    """Remove the leftovers of dead writers from a folder of checkpoints, and say which. Those of a live writer stay.

    On a URL a leftover is a checkpoint's folder without a manifest: only the one run that writes there may sweep it.
    """
    place = open_folder(folder)
    removed = []
    with explained(f"{place.url} cannot be swept"):
        for name, kind in place.entries().items():
            target = _leftover_of(place, name) if kind == "folder" else None
            if target is not None and not is_being_written(target):
                removed.extend(_remove(place.child(name), target))
            elif kind == "file" and _is_dead_lock(place, name):
                lock_target(place.child(names.read_lock(name) or "")).release()  # its file goes with it
                removed.append(name)
    return removed


def sweep_target(target: Folder) -> list[str]:
    """The same for one checkpoint, by the process that holds its lock."""
    place = target.parent()
    removed = []
    for name, kind in place.entries().items():
        found = _leftover_of(place, name) if kind == "folder" else None
        if found is not None and found.name == target.name:
            removed.extend(_remove(place.child(name), target))
    return removed


def enforce_limit(folder: Location, limit: int) -> list[str]:
    """Keep the `limit` newest complete checkpoints (by number), remove what is older, and say which were removed.

    Called after the newest is complete, by the run that holds the folder. Broken checkpoints are not counted, and go when a complete newer
    one makes them old. A folder without a manifest is not ours, and stays.
    """
    if limit < 1:
        raise CheckpointError(f"total_limit={limit} would keep no checkpoint", "keep at least 1")
    place = open_folder(folder)
    removed, num_kept = [], 0
    with explained(f"the checkpoints in {place.url} beyond total_limit={limit} cannot be removed"):
        kinds = place.entries()
        for name in numbered(folder):
            if kinds.get(name) != "folder":
                continue
            checkpoint = place.child(name)
            if num_kept < limit:
                num_kept += _is_whole(checkpoint)
            elif names.MANIFEST in checkpoint.entries():
                checkpoint.delete(_aside(checkpoint))
                removed.append(name)
    return removed


def _is_dead_lock(place: Folder, name: str) -> bool:
    target = names.read_lock(name)
    return (
        target is not None and names.checkpoint_number(target) is not None and not is_being_written(place.child(target))
    )


def _leftover_of(place: Folder, name: str) -> Folder | None:
    if place.can_rename:
        found = names.read_leftover(name)
        return place.child(found[0]) if found else None
    child = place.child(name)
    is_unfinished = names.checkpoint_number(name) is not None and names.MANIFEST not in child.entries()
    return child if is_unfinished else None


def _remove(leftover: Folder, target: Folder) -> list[str]:
    found = names.read_leftover(leftover.name)
    if found and found[1] == "replaced" and not target.exists():
        leftover.publish(target, None)  # its writer died between the two renames: the old checkpoint gets its name back
        return []
    leftover.delete(_aside(leftover))
    return [leftover.name]


def _aside(folder: Folder) -> Folder:
    found = names.read_leftover(folder.name)
    target = found[0] if found else folder.name
    return folder.sibling(names.leftover_name(target, secrets.token_hex(8), "deleted"))


def _is_whole(checkpoint: Folder) -> bool:
    try:
        open_checkpoint(checkpoint.url, verify=False)
    except (CheckpointError, Malformed):
        return False
    return True
