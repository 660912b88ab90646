"""Layouts and results of published text-to-image benchmarks, whose judges are other programs."""
