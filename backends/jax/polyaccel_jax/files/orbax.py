"""Checkpoint folders of Orbax: structure and values by its own handlers, one array at a time by TensorStore, which it writes with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyaccel.errors import BackendUnavailableError, CheckpointError
from polyaccel.stored import Spool, StoredArray

STRUCTURE = "_METADATA"  # in the folder of every item that is a PyTree
EXTRA = "custom_metadata"  # the tree's key for what Orbax keeps beside the arrays, as JSON


class OrbaxFiles:
    """What `StandardCheckpointer` and `PyTreeCheckpointer` write, as trees.

    A top-level entry called `custom_metadata` is the JSON that Orbax keeps beside the tree.
    """

    name = "orbax"

    def read(self, path: Path) -> Any:
        """The saved PyTree: dicts, and lists for sequences; numbers and strings as plain values."""
        ocp = _import_orbax()
        folder = _item_folder(path).absolute()
        try:
            described = ocp.PyTreeCheckpointHandler().metadata(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {str(error).splitlines()[0]:.300}", "take another copy of the checkpoint"
            ) from error
        reader = _Reader(folder, uses_zarr3=bool(described.use_zarr3))
        tree = reader.tree(described.tree, ())
        if not isinstance(tree, dict):
            tree = {str(position): item for position, item in enumerate(tree)} if isinstance(tree, list) else {"": tree}
        return {**tree, EXTRA: described.custom_metadata} if described.custom_metadata else tree

    def write(self, path: Path, tree: Any) -> None:
        """Write the tree as `StandardCheckpointer().save` would; arrays come from files and are not copied."""
        ocp = _import_orbax()
        import jax
        import numpy as np

        handlers = ocp.type_handlers
        registry = handlers.create_type_handler_registry(
            (int, handlers.ScalarHandler()),
            (float, handlers.ScalarHandler()),
            (str, handlers.StringHandler()),
            (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, handlers.ArrayHandler()),  # none is here; Orbax warns of a registry without it
        )
        item = {key: value for key, value in tree.items() if key != EXTRA}
        with (
            Spool(path.parent) as spool,
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer,
        ):
            arguments = ocp.args.PyTreeSave(_in_memory(item, spool, path.name), custom_metadata=tree.get(EXTRA))
            checkpointer.save(path.absolute(), args=arguments)


def _import_orbax() -> Any:
    if importlib.util.find_spec("orbax") is None or importlib.util.find_spec("orbax.checkpoint") is None:
        raise BackendUnavailableError("Orbax is not installed", "pip install orbax-checkpoint")
    import orbax.checkpoint as ocp

    return ocp


def _item_folder(path: Path) -> Path:
    """The folder of the one PyTree in a checkpoint: `path`, or the only item of a CheckpointManager's step."""
    if (path / STRUCTURE).is_file():
        return path
    items = sorted(folder.parent.name for folder in path.glob(f"*/{STRUCTURE}"))
    if len(items) == 1:
        return path / items[0]
    raise CheckpointError(
        f"{path} holds {'no PyTree of Orbax' if not items else 'several items: ' + ', '.join(items)}",
        f"give the folder of one item: {path / items[0]}" if items else "give the folder of one step",
    )


class _Reader:
    """The values behind Orbax's description of a tree."""

    def __init__(self, folder: Path, *, uses_zarr3: bool) -> None:
        self._folder = folder
        self._driver = "zarr3" if uses_zarr3 else "zarr"
        self._is_database = (folder / "manifest.ocdbt").is_file()
        strings = folder / "_strings.json"
        self._strings = json.loads(strings.read_text("utf-8")) if strings.is_file() else {}

    def tree(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.tree(item, (*path, str(key))) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(item, (*path, str(position))) for position, item in enumerate(value)]
        kind = type(value).__name__
        if value is None:
            return None
        if kind == "StringMetadata":
            return self._strings[value.name]
        if kind == "ScalarMetadata":
            return self.array(value.name).item()
        if kind == "ArrayMetadata":
            import numpy as np

            return StoredArray(np.dtype(value.dtype).name, tuple(value.shape), lambda: self.array(value.name))
        raise CheckpointError(
            f"{self._folder}: {'.'.join(path)} is a {kind.removesuffix('Metadata')}, which is neither array, number nor text",
            "save it with StandardCheckpointer",
        )

    def array(self, name: str) -> Any:
        import tensorstore

        base = {"driver": "file", "path": f"{self._folder}/"}
        store = (
            {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            if self._is_database
            else {"driver": "file", "path": f"{self._folder / name}/"}
        )
        spec = {"driver": self._driver, "kvstore": store, "fill_missing_data_reads": False}
        try:
            return tensorstore.open(spec, open=True, read=True).result().read().result()
        except ValueError as error:
            raise CheckpointError(
                f"{self._folder}: {name} cannot be read: {error}", "take another copy of the checkpoint"
            ) from error


def _in_memory(value: Any, spool: Spool, where: str) -> Any:
    import numpy as np

    if isinstance(value, StoredArray):
        array = np.asarray(value.read())
        if array.dtype.name != value.dtype:
            import jax.numpy as jnp

            array = array.view(jnp.dtype(value.dtype))
        return spool.keep(array)
    if isinstance(value, Mapping):
        return {key: _in_memory(item, spool, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_memory(item, spool, f"{where}[{position}]") for position, item in enumerate(value)]
    if value is None or type(value) in (int, float, str):
        return value
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which Orbax has no place for", "leave it out with --only"
    )
