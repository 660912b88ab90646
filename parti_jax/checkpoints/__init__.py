"""Orbax checkpoints of runs: written, verified, and read back whole."""
