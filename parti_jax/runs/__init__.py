"""Infrastructure of a run: its lock, its journal, its processes, and preemption."""
