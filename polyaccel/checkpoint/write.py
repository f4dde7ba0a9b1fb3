"""Writes a checkpoint: every process its own files, the main process the manifest that makes them one, and its final name last."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace as changed
from typing import Any

from polyaccel.checkpoint import names
from polyaccel.checkpoint.contents import Contents
from polyaccel.checkpoint.documents import MAX_BYTES, Malformed
from polyaccel.checkpoint.dtypes import to_bytes
from polyaccel.checkpoint.lock import lock_target, release_target
from polyaccel.checkpoint.manifest import (
    ArrayFacts,
    FileFacts,
    Groups,
    Manifest,
    Part,
    decode_manifest,
    decode_part,
    encode_manifest,
    encode_part,
    why_not_complete,
)
from polyaccel.checkpoint.pieces import Piece
from polyaccel.checkpoint.read import read_manifest
from polyaccel.checkpoint.storage import Folder, Location, explained, open_folder
from polyaccel.checkpoint.sweep import sweep_target
from polyaccel.checkpoint.tensor_file import METADATA, Tensor, layout
from polyaccel.checkpoint.values import pack
from polyaccel.config.resolve import inherited_environment
from polyaccel.errors import CheckpointError
from polyaccel.protocols import Shard
from polyaccel.redaction import Redaction

PATIENCE_S = 300.0  # without any file having grown
_POLL_S = 0.05
_GRACE_S = 30.0  # between the last part and the manifest
log = logging.getLogger(__name__)
_SHARED = "is the folder on a file system that all hosts share?"


def begin_checkpoint(folder_url: Location, *, replace: bool = False, run: str | None = None) -> str:
    """Claim a place on the main process, before any process writes; the others get the attempt that this returns.

    What dead runs have left of this checkpoint is swept. Raises CheckpointError, with nothing changed, where something is there already
    (unless `replace`, which only a path can) or another run is writing it. The claim ends with `write_checkpoint`, or with `abandon`.
    """
    target = open_folder(folder_url)
    attempt = secrets.token_hex(8)
    with explained(f"{target.url} cannot be written"):
        target.parent().make()
        lock_target(target, run=run)
        try:
            sweep_target(target)
            _refuse_existing(target, replace)
        except BaseException:
            release_target(target)
            raise
        try:
            _workplace(target, attempt).make()
        except BaseException:
            _discard(target, _workplace(target, attempt))
            raise
    return attempt


def abandon(folder_url: Location, attempt: str) -> None:
    """Give up what `begin_checkpoint` claimed and nobody is going to write."""
    target = open_folder(folder_url)
    _discard(target, _workplace(target, attempt))


def work_folder(folder_url: Location, attempt: str) -> str:
    """Where the files of this attempt are until it is complete. What a hook puts there becomes part of the checkpoint."""
    return _workplace(open_folder(folder_url), attempt).url


def require_shared(folder_url: Location, attempt: str) -> None:
    """Return once the place that the main process has claimed is seen from here. Raises CheckpointError where it does not appear."""
    target = open_folder(folder_url)
    with explained(f"{target.url} was not written"):
        _await_work(_workplace(target, attempt))


def write_checkpoint(
    folder_url: Location,
    contents: Contents,
    *,
    attempt: str,
    process_index: int,
    num_processes: int,
    facts: Mapping[str, Any],
    replace: bool = False,
    patience_s: float = PATIENCE_S,
) -> str:
    """Write this process's share, and return where the checkpoint is once it is complete, whichever process that is.

    All processes call it, with the `attempt` of `begin_checkpoint`; no collective runs, so it may be on any thread. `facts` are plain
    values of the main process (versions, engine, step, mesh, `config`); secrets in them are hidden as in a run folder. Raises
    CheckpointError naming the file or the process that failed; then no file of this attempt stays, and what was there before is
    untouched.
    """
    target = open_folder(folder_url)
    work = _workplace(target, attempt)
    is_main = process_index == 0
    try:
        with explained(f"{target.url} was not written"):
            _await_work(work)
            said = _said(facts) if is_main else {}  # before gigabytes are written, as all that can be refused
            part = _write_part(work, contents, attempt, process_index, num_processes)
            if not is_main:
                _hand_in(work, part, process_index)
                _wait_for_manifest(target, work, attempt, process_index, patience_s)
                return target.url
            parts = [part, *_collect_parts(work, attempt, num_processes, patience_s)]
            _complete(target, work, parts, contents.shared, said, replace)
    except BaseException as error:
        if is_main:
            _discard(target, work)
        else:
            _report_failure(work, attempt, process_index, error)
        raise
    if is_main:
        release_target(target)
    return target.url


def _await_work(work: Folder) -> None:
    _wait_for(lambda: work.exists() or not work.can_rename, _GRACE_S, f"{work.url} does not appear", _SHARED)


def _said(facts: Mapping[str, Any]) -> dict[str, Any]:
    hidden: dict[str, Any] = Redaction(inherited_environment()).tree(dict(facts))
    pack(hidden, "facts")
    return hidden


# -- one process's share --------------------------------------------------------------------------------------------------------


def _write_part(work: Folder, contents: Contents, attempt: str, process_index: int, num_processes: int) -> Part:
    pack(contents.own, "own")  # refused before gigabytes are written
    if process_index == 0:
        pack(contents.shared, "shared")
    groups: Groups = {}
    stored: list[tuple[str, str, list[Tensor]]] = []
    for group, shards in contents.groups.items():
        file = names.data_file(group, process_index, num_processes)
        groups[group], tensors = _planned(group, file, shards)
        if tensors:
            stored.append((group, file, tensors))
    if num_processes == 1:
        _require_whole(groups)
    there = work.entries() if work.can_rename else {}
    for group, file, _ in stored:
        if file in there:
            raise CheckpointError(
                f"a hook has written {file!r} into {work.url}, where the arrays of {group!r} belong",
                "let it write under another name, or take that model's weights out of the list that it is given",
            )
    files = {
        file: work.write(file, layout(tensors, {"format": "polyaccel", "group": group}))
        for group, file, tensors in stored
    }
    return Part(attempt, files, groups, contents.own)


def _planned(group: str, file: str, shards: Iterable[Shard]) -> tuple[dict[str, ArrayFacts], list[Tensor]]:
    """The arrays of a group as far as this process has them, and what goes into its file for them."""
    arrays: dict[str, ArrayFacts] = {}
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        data = to_bytes(shard, group)
        whole, offset, shape = (
            tuple(map(int, place)) for place in (shard.global_shape, shard.offset, shard.data.shape)
        )
        key = _key(shard.name, offset, whole == shape, tensors)
        tensors[key] = Tensor(key, shard.dtype, shape, data)
        array = ArrayFacts(shard.dtype, whole, (Piece(file, key, offset, shape),))
        known = arrays.get(shard.name)
        arrays[shard.name] = array if known is None else _joined(group, shard.name, known, array)
    return arrays, list(tensors.values())


def _key(name: str, offset: tuple[int, ...], is_whole: bool, taken: Mapping[str, Tensor]) -> str:
    key = name if is_whole else f"{name}@{','.join(map(str, offset))}"
    while key in taken or key == METADATA:
        key += "@"
    return key


def _joined(group: str, name: str, one: ArrayFacts, other: ArrayFacts) -> ArrayFacts:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        first, second = (f"{array.dtype} of shape {list(array.shape)}" for array in (one, other))
        raise CheckpointError(
            f"{group}: {name!r} is {first} in one piece and {second} in another",
            "give two arrays two names; do all processes hold the same model?",
        )
    return changed(one, pieces=one.pieces + other.pieces)


def _require_whole(groups: Groups) -> None:
    why = why_not_complete(groups)
    if why:
        raise CheckpointError(why, "every element must be given once over all processes; do all of them save?")


def _hand_in(work: Folder, part: Part, process_index: int) -> None:
    name = names.part_file(process_index)
    work.write(f"{name}.new", [memoryview(encode_part(part))])  # the main process must never read half of it
    work.rename_file(f"{name}.new", name)


def _report_failure(work: Folder, attempt: str, process_index: int, error: BaseException) -> None:
    """Tell the main process at once, where the storage still takes a few bytes; it would otherwise wait until its patience ends."""
    said = Redaction(inherited_environment()).text(f"{type(error).__name__}: {error}")
    try:
        if work.exists():
            _hand_in(work, Part(attempt, {}, {}, {}, said), process_index)
    except (OSError, CheckpointError):
        return


def _wait_for_manifest(target: Folder, work: Folder, attempt: str, process_index: int, patience_s: float) -> None:
    """Return when the main process has completed the checkpoint. It removes the parts shortly before that, and when it gives up."""
    mine = names.part_file(process_index)
    watch = _Watch(work, patience_s)
    gone_since: float | None = None
    while True:
        now = time.monotonic()
        if mine in work.entries():
            watch.check(f"process 0 did not complete {target.url}", "see what process 0 said")
        elif (
            _attempt_of(open_folder(target.url)) == attempt
        ):  # anew: an opened folder stays the one that was there before
            return
        elif gone_since is None:
            gone_since = now
        elif now - gone_since > _GRACE_S:
            raise CheckpointError(f"process 0 gave up on {target.url}", "see what process 0 said")
        time.sleep(_POLL_S)


def _attempt_of(folder: Folder) -> str | None:
    try:
        return read_manifest(folder).attempt
    except (OSError, Malformed):
        return None


# -- the main process ------------------------------------------------------------------------------------------------------------


def _collect_parts(work: Folder, attempt: str, num_processes: int, patience_s: float) -> list[Part]:
    parts: dict[int, Part] = {}
    watch = _Watch(work, patience_s)
    while len(parts) < num_processes - 1:
        there = work.entries()
        for index in range(1, num_processes):
            if index not in parts and names.part_file(index) in there:
                parts[index] = _read_part(work, index, attempt)
        missing = [str(index) for index in range(1, num_processes) if index not in parts]
        if missing:
            who = f"process {missing[0]} has" if len(missing) == 1 else f"processes {', '.join(missing[:8])} have"
            watch.check(f"{who} not handed in their part of {work.url}", _SHARED)
            time.sleep(_POLL_S)
    return [parts[index] for index in sorted(parts)]


def _read_part(work: Folder, index: int, attempt: str) -> Part:
    file = work.open(names.part_file(index))
    try:
        part = decode_part(file.read(0, min(file.size, MAX_BYTES)))
    except Malformed as error:
        raise CheckpointError(f"the part of process {index} in {work.url} cannot be read: {error}", _SHARED) from None
    finally:
        file.close()
    if part.attempt != attempt:
        raise CheckpointError(
            f"process {index} has written for another attempt", "broadcast the attempt of the main process"
        )
    if part.failure is not None:
        raise CheckpointError(f"process {index} could not write its part: {part.failure}", "no checkpoint was written")
    return part


def _complete(
    target: Folder, work: Folder, parts: list[Part], shared: dict[str, Any], facts: dict[str, Any], replace: bool
) -> None:
    files = {name: found for part in parts for name, found in part.files.items()}
    groups: Groups = {}
    for part in parts:
        for group, arrays in part.groups.items():
            into = groups.setdefault(group, {})
            for name, array in arrays.items():
                into[name] = _joined(group, name, into[name], array) if name in into else array
    _require_whole(groups)
    for index in range(1, len(parts)):
        work.remove_file(names.part_file(index))
    if work.can_rename:
        _name_plainly(work, files, groups)
        for name, kind in work.files().items():
            if name not in files:
                files[name] = _adopted(work, name, kind)
    manifest = Manifest(parts[0].attempt, time.time(), facts, files, groups, shared, tuple(part.own for part in parts))
    data = encode_manifest(manifest)
    decode_manifest(data)  # whatever a reader would refuse is refused now, and never acknowledged
    _refuse_existing(target, replace)
    work.write(names.MANIFEST, [memoryview(data)])
    aside = target.sibling(names.leftover_name(target.name, manifest.attempt, "replaced"))
    work.publish(target, aside if replace else None)


def _name_plainly(work: Folder, files: dict[str, FileFacts], groups: Groups) -> None:
    """`model.00001-of-00004.safetensors` becomes `model.safetensors` where no other process holds anything of the model."""
    there = work.entries()
    for group, arrays in groups.items():
        used = {piece.file for array in arrays.values() for piece in array.pieces}
        plain = names.data_file(group, 0, 1)
        if len(used) != 1 or plain in used or plain in there:
            continue
        (old,) = used
        work.rename_file(old, plain)
        files[plain] = files.pop(old)
        for name, array in arrays.items():
            arrays[name] = changed(array, pieces=tuple(changed(piece, file=plain) for piece in array.pieces))


def _adopted(work: Folder, name: str, kind: str) -> FileFacts:
    if kind != "file" or not names.is_safe(name) or name == names.MANIFEST or names.is_part(name):
        raise CheckpointError(
            f"{name!r:.200} was put into {work.url}, and a checkpoint cannot keep it",
            "let hooks write plain files whose names are none of the checkpoint's own",
        )
    return work.adopt(name)


def _refuse_existing(target: Folder, replace: bool) -> None:
    if target.can_rename:
        if target.exists() and target.kind() != "folder":
            raise CheckpointError(f"{target.url} exists, and is a {target.kind()}", "choose another name")
        if target.entries() and not replace:
            raise CheckpointError(f"{target.url} exists already", "choose another folder, or replace it on purpose")
        if target.entries() and names.MANIFEST not in target.entries():
            raise CheckpointError(
                f"{target.url} exists and is no checkpoint, so it is not replaced",
                "choose another folder, or remove it yourself",
            )
    elif names.MANIFEST in target.entries():
        raise CheckpointError(
            f"{target.url} exists already, and a URL cannot be replaced in one step",
            "choose another name, or delete it first",
        )


def _discard(target: Folder, work: Folder) -> None:
    """Leave nothing of a failed attempt; the reason for the failure is on its way and must not be hidden by another one."""
    try:
        if work.can_rename:
            if work.exists():
                work.delete(work.sibling(f"{work.name.removesuffix('.saving')}.deleted"))
        elif _attempt_of(work) is None:
            work.delete(work)
    except OSError as error:
        log.warning("%s could not be removed: %s", work.url, error)
    finally:
        release_target(target)


def _workplace(target: Folder, attempt: str) -> Folder:
    if not target.can_rename:
        return target
    return target.sibling(names.leftover_name(target.name, attempt, "saving"))


class _Watch:
    """Patience that starts anew whenever something in a folder grows: a slow disk is not a dead process."""

    def __init__(self, folder: Folder, patience_s: float) -> None:
        self._folder = folder
        self._patience_s = patience_s
        self._seen: object = None
        self._since = time.monotonic()

    def check(self, message: str, hint: str) -> None:
        now = time.monotonic()
        seen = self._folder.sizes()
        if seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since > self._patience_s:
            raise CheckpointError(f"{message}, and nothing has been written for {self._patience_s:.0f} s", hint)


def _wait_for(is_so: Callable[[], bool], patience_s: float, message: str, hint: str) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > deadline:
            raise CheckpointError(message, hint)
        time.sleep(_POLL_S)
