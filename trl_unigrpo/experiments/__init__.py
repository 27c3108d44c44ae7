"""Experiments on the built-in world, on top of all else."""
