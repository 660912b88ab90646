"""What keeps a run alive: its lock, its journal, its processes, and preemption."""
