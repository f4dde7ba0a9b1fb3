"""Data parallelism while the processes have different numbers of batches: `torch.distributed.algorithms.join`, on any device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.distributed.algorithms.join import Join, Joinable

from polyaccel_torch.collectives import ProcessCollectives, SingleCollectives
from polyaccel_torch.parallel import parallel_part


@contextmanager
def joined(handles: Sequence[Any], collectives: ProcessCollectives | SingleCollectives) -> Iterator[None]:
    """Inside, a process that leaves the loop waits in the exit of the context, and answers the others' gradient exchanges with zeros.

    A gradient is the sum over the processes that have a batch, divided by the number of all of them; at the end every process has
    the parameters of one that went on to the last batch. Handles that exchange nothing need no joining.
    """
    parts = [part for handle in handles if (part := _joinable(handle)) is not None]
    if not parts:
        yield
        return
    configurations = [part._join_config for part in parts]
    was_uneven, collectives.is_uneven = collectives.is_uneven, True
    join = Join(parts, enable=True, throw_on_early_termination=False)
    try:
        yield
    except BaseException as error:
        join.__exit__(type(error), error, error.__traceback__)  # waits for nobody
        raise
    else:
        with warnings.catch_warnings():  # it changes the filters of the process
            join.__exit__(None, None, None)
    finally:
        collectives.is_uneven = was_uneven
        for part, configuration in zip(parts, configurations, strict=True):
            part._join_config = configuration  # Join leaves its own, and every later forward pass would exchange a flag


def _joinable(handle: Any) -> Joinable | None:
    part = parallel_part(handle)
    if part is not None:
        return part
    return handle if isinstance(handle, Joinable) else None
