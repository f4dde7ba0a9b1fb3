"""Checkpoints from one format to another, one array at a time: ours, and those of Hugging Face, Accelerate, torch DCP and Orbax."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from polyaccel.checkpoint import names
from polyaccel.checkpoint.contents import Contents
from polyaccel.checkpoint.export import sync_folder
from polyaccel.checkpoint.formats import accelerate, dcp, huggingface, orbax
from polyaccel.checkpoint.formats.bundle import Bundle, Choices, numbered, of_saved, to_contents
from polyaccel.checkpoint.formats.meaning import complete, is_optimizer, parameters_of
from polyaccel.checkpoint.read import open_checkpoint
from polyaccel.checkpoint.run import values_group
from polyaccel.checkpoint.storage import is_url
from polyaccel.checkpoint.write import begin_checkpoint, write_checkpoint
from polyaccel.errors import CheckpointError, nearest
from polyaccel.stored import Spool

OURS = "polyaccel"
# In the order in which a folder is tried. Accelerate's layout also has model.safetensors, which alone is Hugging Face's.
FOREIGN: dict[str, ModuleType] = {"dcp": dcp, "orbax": orbax, "accelerate": accelerate, "huggingface": huggingface}
FORMATS = (OURS, *sorted(FOREIGN))


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did: the formats, arrays and bytes by group, and what was left behind."""

    source_format: str
    target_format: str
    groups: dict[str, int]
    left_behind: tuple[str, ...]


def detect(path: Path) -> str:
    """The format of a checkpoint. Raises CheckpointError for a path that is in none of them."""
    if not path.exists():
        raise CheckpointError(f"there is no {path}", "check the path")
    if (path / names.MANIFEST).is_file():
        return OURS
    for name, module in FOREIGN.items():
        if module.recognizes(path):
            return name
    raise CheckpointError(
        f"{path} is a checkpoint in none of the formats that are known", f"known: {', '.join(FORMATS)}"
    )


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    only: Collection[str] = (),
    choices: Choices | None = None,
) -> Converted:
    """Write the checkpoint `source` as the new folder `target` in format `to`.

    `only` names the groups to take (all by default). The target appears when it is complete and on the disk. Raises CheckpointError,
    without a target, where something there has no exact place in the other format; nothing that a source holds is run.
    """
    for place in (source, target):
        if is_url(place):
            raise CheckpointError(f"{place} is a URL, and only local folders are converted", "copy the folder")
    source, target = Path(source), Path(target)
    if to not in FORMATS:
        raise CheckpointError(f"--to {to!r} is no format", nearest(to, FORMATS))
    found = detect(source)
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already", "choose another folder, or remove it yourself")
    bundle = _read(source, found, choices or Choices())
    bundle.parameters = parameters_of(bundle)
    _select(bundle, only, source, found)
    if to == OURS:
        _write_ours(target, bundle, found)
    else:
        _write_foreign(target, bundle, FOREIGN[to])
    groups = {group: len(arrays) for group, arrays in bundle.groups.items()}
    return Converted(found, to, groups, tuple(bundle.left_behind))


def _read(source: Path, found: str, choices: Choices) -> Bundle:
    if found == OURS:
        return of_saved(open_checkpoint(source))
    bundle: Bundle = FOREIGN[found].read(source, choices)
    return bundle


def _select(bundle: Bundle, only: Collection[str], source: Path, origin: str) -> None:
    if not only:
        return
    groups = bundle.groups
    known = {*bundle.groups, *bundle.shared.get("values", {})}
    for name in only:
        if name not in known:
            raise CheckpointError(f"--only {name}: {source} has no such group", nearest(name, known))
    kept = {*only, *map(values_group, only)}
    bundle.groups = {name: arrays for name, arrays in bundle.groups.items() if name in kept}
    shared, bundle.shared, bundle.own = bundle.shared, {}, []
    if not any(map(is_optimizer, only)):
        return  # weights, and nothing that could be continued
    bundle.shared["values"] = {name: value for name, value in shared.get("values", {}).items() if name in kept}
    for key in ("parameter_names", "group_sizes"):
        entries = zip(numbered(groups, "optimizer"), shared.get(key, ()), strict=False)
        bundle.shared[key] = [entry for group, entry in entries if group in kept]
    complete(bundle, origin)


def _write_ours(target: Path, bundle: Bundle, found: str) -> None:
    num_processes = max(1, len(bundle.own))
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with Spool(target.absolute().parent) as spool:
        shares = [to_contents(bundle, spool), *(Contents(own=own) for own in bundle.own[1:])]
        attempt = begin_checkpoint(target)
        with ThreadPoolExecutor(num_processes) as pool:
            parts = [
                pool.submit(
                    write_checkpoint,
                    target,
                    share,
                    attempt=attempt,
                    process_index=index,
                    num_processes=num_processes,
                    facts={"converted_from": found},
                )
                for index, share in enumerate(shares)
            ]
            for part in parts:
                part.result()


def _write_foreign(target: Path, bundle: Bundle, module: ModuleType) -> None:
    target = target.absolute()
    work = target.with_name(f".{target.name}.{secrets.token_hex(8)}.converting")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        module.write(work, bundle)
        for folder, _, files in os.walk(work):
            for file in files:
                _sync(Path(folder, file))
            sync_folder(Path(folder))
        work.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} was not written: {error}", "see that there is space, and that the folder may be written to"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
