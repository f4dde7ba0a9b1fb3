"""What was asked for, under Accelerate's names; `accelerator.config` has every setting, with its source."""

from __future__ import annotations

from polyaccel.distribution import DistributedType
from polyaccel.facade.places import Places


class Settings(Places):
    """Read-only: they are arguments of the constructor."""

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch_size is the global batch."""
        return self.plan.split_batches

    @property
    def even_batches(self) -> bool:
        """Whether the last global batch is completed from the first samples."""
        return self.plan.even_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether process 0 alone reads the data; None: where the data asks for it."""
        return self.config.dispatch_batches

    @property
    def use_seedable_sampler(self) -> bool:
        """Whether an epoch's order follows from a seed and the number of the epoch alone."""
        return self.config.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """Whether copies to the device do not wait for each other."""
        return self.config.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """Whether prepared loaders are torchdata's StatefulDataLoader."""
        return self.config.use_stateful_dataloader

    @property
    def multi_device(self) -> bool:
        """Whether there are several processes, each on an accelerator of its own."""
        kind = self.distributed_type
        return kind.name.startswith("MULTI_") and kind is not DistributedType.MULTI_CPU

    @property
    def should_save_model(self) -> bool:
        """Whether this process is the one that writes whole weights."""
        return self.is_main_process

    @property
    def deepspeed_plugin(self) -> None:
        """None: there is no DeepSpeed here, which scripts find out by asking."""
        return None
