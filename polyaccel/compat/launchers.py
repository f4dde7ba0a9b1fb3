"""`accelerate.launchers`: a function started in several processes. See `polyaccel.launch.notebook`."""

from polyaccel.launch.notebook import debug_launcher, notebook_launcher

__all__ = ["debug_launcher", "notebook_launcher"]
