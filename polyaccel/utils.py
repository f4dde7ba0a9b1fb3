"""Accelerate's `accelerate.utils` names, re-exported. No code lives here, and nothing in the core imports it."""

from polyaccel.seeding import set_seed

__all__ = ["set_seed"]
