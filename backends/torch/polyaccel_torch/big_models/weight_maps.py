"""Mappings of names to weights that are read when they are asked for, and Accelerate's offload files (`.dat`: the bytes of one tensor).

polyaccel itself offloads to safetensors; these are for folders and scripts that have the other form.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from polyaccel.errors import CheckpointError, ConfigError
from polyaccel_torch.big_models.tensors import is_inside, place_in_model, resolve_dtype
from polyaccel_torch.big_models.weights import OpenFiles, add_to_index, raw_tensor, read_index

Folder = str | os.PathLike[str]


def offload_weight(
    weight: torch.Tensor, weight_name: str, offload_folder: Folder, index: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Write a tensor to `<name>.dat`, and what its bytes are to `index`, which is returned."""
    value = weight.detach().to("cpu").contiguous()
    value.reshape(-1).view(torch.uint8).numpy().tofile(Path(offload_folder) / f"{weight_name}.dat")
    if index is not None:
        index[weight_name] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    return index


def load_offloaded_weight(weight_file: Folder, weight_info: Mapping[str, Any]) -> torch.Tensor:
    """The tensor in a `.dat` file, mapped; what is written to it stays in this process. Raises CheckpointError."""
    dtype = resolve_dtype(weight_info["dtype"])
    assert dtype is not None
    return raw_tensor(weight_file, dtype, torch.Size(weight_info["shape"]))


def save_offload_index(index: Mapping[str, Any] | None, offload_folder: Folder) -> None:
    """Add entries to the folder's index.json."""
    if index:
        add_to_index(offload_folder, index)


def offload_state_dict(save_dir: Folder, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict as `.dat` files with an index."""
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    for name, value in state_dict.items():
        offload_weight(value, name, save_dir, index)
    save_offload_index(index, save_dir)


class PrefixedDataset(Mapping[str, torch.Tensor]):
    """The entries of a mapping whose names start with `prefix`, by the rest of their names."""

    def __init__(self, dataset: Mapping[str, torch.Tensor], prefix: str) -> None:
        self.dataset = dataset
        self.prefix = prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.dataset[f"{self.prefix}{key}"]

    def __contains__(self, key: object) -> bool:
        return f"{self.prefix}{key}" in self.dataset  # a question, and no read

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in self.dataset if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class OffloadedWeightsLoader(Mapping[str, torch.Tensor]):
    """Weights of a state dict, and for the other names those on disk, mapped when they are asked for.

    Args:
        state_dict: comes first where a name is in both.
        save_folder: a folder of offloaded weights with its index.
        index: instead of the folder's: {name: {"safetensors_file", "weight_name", "dtype"}}, or {"dtype", "shape"} for `<name>.dat`.
        device: of what is read from disk; None: the CPU.

    Raises ConfigError where nothing is given, CheckpointError for a file that does not hold what the index says.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_folder: Folder | None = None,
        index: Mapping[str, Any] | None = None,
        device: int | str | torch.device | None = None,
    ) -> None:
        if state_dict is None and save_folder is None and index is None:
            raise ConfigError("no weights are given", "give a state_dict, a save_folder or an index")
        self.state_dict = state_dict or {}
        self.save_folder = save_folder
        if index is None:
            index = {} if save_folder is None else read_index(save_folder)
        self.index = index
        self.device = device
        self.all_keys = list(dict.fromkeys([*self.state_dict, *self.index]))

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        return read_entry(key, self.index[key], self.save_folder, self.device)

    def __contains__(self, key: object) -> bool:
        return key in self.state_dict or key in self.index

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)


def read_entry(
    name: str, entry: Mapping[str, Any], folder: Folder | None, device: int | str | torch.device | None = None
) -> torch.Tensor:
    """The weight that an index entry describes. Raises CheckpointError."""
    if entry.get("safetensors_file") is not None:
        with OpenFiles() as files:
            value = files.tensor(entry["safetensors_file"], entry.get("weight_name", name))
        value = value.to(resolve_dtype(entry.get("dtype")) or value.dtype)
    elif folder is None:
        raise CheckpointError(f"{name} is in a .dat file, and its folder is not known", "give save_folder=")
    else:
        value = load_offloaded_weight(Path(folder) / f"{name}.dat", entry)
    return value if device is None else value.to(device)


def load_offloaded_weights(model: torch.nn.Module, index: Mapping[str, Any] | None, offload_folder: Folder) -> None:
    """Give a model the weights that an index names, on the CPU."""
    for name, entry in (index or {}).items():
        place = place_in_model(model, name)
        value = read_entry(name, entry, offload_folder)
        place.fill(value.to(place.tensor.dtype, copy=True))


def extract_submodules_state_dict(state_dict: Mapping[str, Any], submodule_names: Iterable[str]) -> dict[str, Any]:
    """The entries that are one of these modules or tensors, or inside one."""
    return {key: value for name in submodule_names for key, value in state_dict.items() if is_inside(key, name)}
