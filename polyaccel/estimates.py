"""What a model needs in memory, counted without any: the question that `polyaccel estimate-memory` asks, and an adapter's answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Bytes of a number in each precision of the report. The last two are for inference, and for matrices alone.
WEIGHT_BYTES: Mapping[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}
TRAINING_PRECISIONS = ("float32", "bfloat16", "float16")
# What is not a matrix of a layer stays in this precision where matrices are quantized.
UNQUANTIZED = "bfloat16"


@dataclass(frozen=True, slots=True)
class InputShape:
    """One input of a model: sizes, and its dtype by name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Question:
    """A model, and how it is to be trained.

    factory: makes the module, without arguments. `config_folder`: a transformers configuration instead of it.
    inputs: of one call; empty: those that a transformers model is known to take, with these two sizes.
    """

    factory: Any
    config_folder: str | None
    inputs: tuple[InputShape, ...]
    batch_size: int
    sequence_length: int | None
    optimizer: str
    optimizer_settings: Mapping[str, Any]
    precisions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters of one dtype: `count` numbers, of which `matrix_count` are in matrices that can be quantized."""

    name: str
    count: int
    matrix_count: int
    bytes: int
    is_floating: bool = True

    def bytes_in(self, precision: str) -> float:
        """Stored in another precision; integers stay what they are."""
        if not self.is_floating:
            return self.bytes
        size = WEIGHT_BYTES[precision]
        if precision in TRAINING_PRECISIONS:
            return self.count * size
        return self.matrix_count * size + (self.count - self.matrix_count) * WEIGHT_BYTES[UNQUANTIZED]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an adapter counted. All bytes are those of one device that holds everything.

    parameters, buffers: each tensor once. `trainable_bytes`: of gradients, in the dtypes that the model has.
    layers: of the modules that are not split, each as the sum of its tensors.
    activations: bytes held for the backward at the end of a forward, by precision; absent where they could not be traced.
    """

    dialect: str
    parameters: tuple[Part, ...]
    buffers: tuple[Part, ...]
    trainable_count: int
    trainable_bytes: int
    optimizer_bytes: int
    layers: Mapping[str, tuple[Part, ...]]
    activations: Mapping[str, int]
    inputs: tuple[InputShape, ...]
    notes: list[str] = field(default_factory=list)

    def weights_in(self, precision: str) -> int:
        """Parameters and buffers for inference."""
        return int(sum(part.bytes_in(precision) for part in (*self.parameters, *self.buffers)))

    def largest_layer_in(self, precision: str) -> tuple[str, int]:
        """Its name and bytes; the first of equal ones."""
        sizes = {name: int(sum(part.bytes_in(precision) for part in parts)) for name, parts in self.layers.items()}
        name = max(sizes, key=sizes.__getitem__, default="")
        return name, sizes.get(name, 0)
