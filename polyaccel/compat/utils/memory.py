"""`accelerate.utils.memory`: what to do when a device has no memory left. See `polyaccel.memory`."""

from polyaccel.memory import clear_device_cache, find_executable_batch_size, is_out_of_memory, release_memory

should_reduce_batch_size = is_out_of_memory

__all__ = ["clear_device_cache", "find_executable_batch_size", "release_memory", "should_reduce_batch_size"]
