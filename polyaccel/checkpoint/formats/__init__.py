"""Checkpoints in the layouts of other libraries: what stands where in them, and how it reads here."""
