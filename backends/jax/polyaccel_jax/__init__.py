"""The jax adapter: runs programs on a jax device mesh. Importing it imports no framework."""
