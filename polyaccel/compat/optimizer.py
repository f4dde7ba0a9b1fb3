"""`accelerate.optimizer`: what `prepare` returns for an optimizer. `prepare` alone makes one."""

from polyaccel.prepared import OptimizerHandle as AcceleratedOptimizer

__all__ = ["AcceleratedOptimizer"]
