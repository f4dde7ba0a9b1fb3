"""`accelerate.logging`: loggers that know in which process they are. See `polyaccel.logs`."""

from polyaccel.logs import ProcessLogger, get_logger

MultiProcessAdapter = ProcessLogger

__all__ = ["MultiProcessAdapter", "get_logger"]
