"""The xla adapter: PyTorch-XLA, one SPMD process per host. Importing it imports no framework."""
