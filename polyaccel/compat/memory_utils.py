"""`accelerate.memory_utils`, the old home of `find_executable_batch_size`."""

from polyaccel.memory import find_executable_batch_size

__all__ = ["find_executable_batch_size"]
