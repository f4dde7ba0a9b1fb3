"""Checkpoints: sharded safetensors and one manifest; a complete one is never lost, a broken one is never used."""

from polyaccel.checkpoint.background import Writer
from polyaccel.checkpoint.contents import Contents
from polyaccel.checkpoint.lock import Holder, Lock, folder_holder, lock_folder
from polyaccel.checkpoint.manifest import Manifest
from polyaccel.checkpoint.newest import newest_checkpoint, next_number
from polyaccel.checkpoint.read import Saved, open_checkpoint
from polyaccel.checkpoint.sweep import enforce_limit, sweep
from polyaccel.checkpoint.write import abandon, begin_checkpoint, work_folder, write_checkpoint

__all__ = [
    "Contents",
    "Holder",
    "Lock",
    "Manifest",
    "Saved",
    "Writer",
    "abandon",
    "begin_checkpoint",
    "enforce_limit",
    "folder_holder",
    "lock_folder",
    "newest_checkpoint",
    "next_number",
    "open_checkpoint",
    "sweep",
    "work_folder",
    "write_checkpoint",
]
