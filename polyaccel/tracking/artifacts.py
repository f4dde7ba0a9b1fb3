"""Files and folders that a script logs: small files are copied into the run folder, larger things are recorded by path and size."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

MAX_COPIED_BYTES = 64 * 2**20
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def free_name(folder: Path, stem: str, suffix: str) -> Path:
    """A file of `folder` that does not exist yet, named after `stem`, which may hold anything."""
    plain = _NOT_IN_NAMES.sub("_", stem).strip(".") or "_"
    file = folder / f"{plain[:100]}{suffix}"
    number = 1
    while file.exists():
        number += 1
        file = folder / f"{plain[:100]}.{number}{suffix}"
    return file


def keep(run_folder: Path, artifact: Any, name: str | None) -> tuple[dict[str, Any], Any]:
    """(what events.jsonl notes, what trackers get) of a path or of a vendor's own object.

    A file of at most 64 MiB is copied, so that the run keeps what it was; a larger file or a folder is noted by path and size. A path
    that does not exist is noted as missing, with a name that trackers will not find either.
    """
    if not isinstance(artifact, (str, Path)):
        kind = f"{type(artifact).__module__}.{type(artifact).__qualname__}"
        return {"name": name or str(getattr(artifact, "name", kind)), "object": kind}, artifact
    path = Path(artifact).absolute()
    facts: dict[str, Any] = {"name": name or path.name, "path": str(path)}
    if path.is_dir():
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        return {**facts, "num_files": len(sizes), "num_bytes": sum(sizes)}, str(path)
    if not path.is_file():
        return {**facts, "is_missing": True}, str(path)
    facts["num_bytes"] = path.stat().st_size
    if facts["num_bytes"] > MAX_COPIED_BYTES:
        return facts, str(path)
    copied = free_name(run_folder / "artifacts", path.stem, path.suffix)
    copied.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, copied)
    return {**facts, "file": copied.relative_to(run_folder).as_posix()}, str(copied)
