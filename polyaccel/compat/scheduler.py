"""`accelerate.scheduler`: what `prepare` returns for a scheduler. `prepare` alone makes one."""

from polyaccel.accumulation import SchedulerGate as AcceleratedScheduler

__all__ = ["AcceleratedScheduler"]
