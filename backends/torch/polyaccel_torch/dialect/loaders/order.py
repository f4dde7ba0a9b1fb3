"""The random order of a torch loader's passes: drawn once, the same on all processes, and repeatable."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler

from polyaccel.errors import CheckpointError, UnsupportedError

Exchange = Callable[[Any], list[Any]]  # this process's value in, those of all processes out; every process calls it
RNG_TYPES = frozenset({"generator", "torch", "numpy", "python", "cuda"})
_SEEDS = 2**64


class SeedableRandomSampler(RandomSampler):
    """A RandomSampler whose order follows from `initial_seed + epoch` alone; every full pass counts `epoch` up.

    Takes what RandomSampler takes, and `data_seed`: the initial seed, by default that of torch's global generator (`set_seed`).
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed: int = torch.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed((self.initial_seed + self.epoch) % _SEEDS)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch


class Keys:
    """A sampler of keys as a batch sampler of one key per batch."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[Any]]:
        return ([key] for key in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class RandomOrder:
    """Draws the order of each pass, once, and makes it the same on all processes.

    The default random sampler draws a seed from the global generator when a pass starts. Here the seed is drawn at the same
    moment from the same generator, but kept, so that process 0's can be sent to the others and a pass can be repeated.
    """

    def __init__(self, exchange: Exchange | None, rng_types: tuple[str, ...]) -> None:
        self.seed: int | None = None
        self.replay: int | None = None
        self._exchange = exchange
        self._private: torch.Generator | None = None
        self._own: torch.Generator | None = None
        self._seedable: SeedableRandomSampler | None = None
        self._globals = tuple(name for name in rng_types if name != "generator")
        self._is_shared = exchange is not None and "generator" in rng_types
        for name in rng_types:
            if name not in RNG_TYPES:
                raise UnsupportedError(
                    f"rng_types names {name!r}, a generator that a torch DataLoader cannot take from process 0",
                    f"use: {', '.join(sorted(RNG_TYPES))}",
                )

    @property
    def is_fixed(self) -> bool:
        """Whether no generator known here decides the order."""
        return self._private is None and self._own is None and self._seedable is None

    def make_seedable(self, batch_sampler: Any, data_seed: int | None) -> Any:
        """The batch sampler with a SeedableRandomSampler in place of its RandomSampler, if it has one.

        torch's own batch samplers are copied; another class gets the sampler in place, since its user may go on steering it.
        """
        sampler = getattr(batch_sampler, "sampler", None)
        if not isinstance(sampler, RandomSampler) or isinstance(sampler, SeedableRandomSampler):
            return batch_sampler
        if type(batch_sampler) in (BatchSampler, Keys):
            batch_sampler = copy.copy(batch_sampler)
        batch_sampler.sampler = SeedableRandomSampler(
            sampler.data_source,
            sampler.replacement,
            sampler._num_samples,
            data_seed=data_seed,
        )
        return batch_sampler

    def follow(self, batch_sampler: Any) -> Any:
        """The batch sampler, with its random sampler drawing from here; the user's own object where nothing has to change."""
        sampler: Any = getattr(batch_sampler, "sampler", None)
        if isinstance(sampler, SeedableRandomSampler):
            self._seedable = sampler
            return batch_sampler
        if isinstance(getattr(sampler, "generator", None), torch.Generator):
            self._own = sampler.generator
            return batch_sampler
        has_no_state = type(sampler) is RandomSampler and type(batch_sampler) in (BatchSampler, Keys)
        if not has_no_state and not (self._is_shared and hasattr(sampler, "generator")):
            return batch_sampler
        self._private = torch.Generator()
        if has_no_state:  # torch's own classes: a copy serves as well, and the user's loader stays as it is
            batch_sampler = copy.copy(batch_sampler)
            batch_sampler.sampler = sampler = copy.copy(sampler)
        sampler.generator = self._private
        return batch_sampler

    def follow_dataset(self, dataset: Any) -> None:
        """An iterable dataset may shuffle with a generator of its own."""
        generator = getattr(dataset, "generator", None)
        if isinstance(generator, torch.Generator):
            self._own = generator

    def draw(self) -> None:
        """Called when a pass starts, right before its first index is drawn."""
        if self._private is not None:
            drawn, self.replay = self.replay, None
            if drawn is None:
                drawn = int(torch.empty((), dtype=torch.int64).random_().item())
                if self._is_shared:
                    drawn = self._from_main(drawn)
            self.seed = drawn
            self._private.manual_seed(drawn)
        if self._exchange is None:
            return
        if self._is_shared and self._own is not None:
            self._own.set_state(self._shared_tensor(self._own.get_state()))
        if self._is_shared and self._seedable is not None:
            self._seedable.initial_seed = self._from_main(self._seedable.initial_seed)
        for name in self._globals:
            self._share_global(name)

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------------

    def read(self, *others: torch.Generator | None) -> tuple[bytes, ...]:
        """The states of the generators that decide the order, and of `others`; a seedable sampler's is its seed."""
        states = [generator.get_state().numpy().tobytes() for generator in self._generators(others)]
        if self._seedable is not None:
            states.append((self._seedable.initial_seed % _SEEDS).to_bytes(8, "little"))
        return tuple(states)

    def write(self, states: tuple[bytes, ...], *others: torch.Generator | None) -> None:
        """Continue from states that `read` gave. Raises CheckpointError for another number of them."""
        held = self._generators(others)
        expected = len(held) + (self._seedable is not None)
        if expected != len(states):
            raise CheckpointError(
                f"the loader was saved with {len(states)} random generators of its own and has {expected}",
                "build the DataLoader and its sampler with the generators that it was saved with",
            )
        if self._seedable is not None:
            self._seedable.initial_seed = int.from_bytes(states[-1], "little")
        for generator, state in zip(held, states, strict=False):
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def _generators(self, others: tuple[torch.Generator | None, ...]) -> list[torch.Generator]:
        given = (self._own, *others)
        return list({id(one): one for one in given if isinstance(one, torch.Generator)}.values())

    # -- from process 0 ------------------------------------------------------------------------------------------------

    def _from_main(self, value: Any) -> Any:
        assert self._exchange is not None
        return self._exchange(value)[0]

    def _shared_tensor(self, state: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer(bytearray(self._from_main(state.numpy().tobytes())), dtype=torch.uint8)

    def _share_global(self, name: str) -> None:
        if name == "torch":
            torch.set_rng_state(self._shared_tensor(torch.get_rng_state()))
        elif name == "cuda":
            torch.cuda.set_rng_state(self._shared_tensor(torch.cuda.get_rng_state()))
        elif name == "python":
            version, words, gauss = self._from_main(random.getstate())
            random.setstate((version, tuple(words), gauss))
        else:
            import numpy as np

            kind, keys, position, has_gauss, gauss = self._from_main(np.random.get_state())
            np.random.set_state((kind, np.asarray(keys), position, has_gauss, gauss))
