"""Measures the quality of generated pictures."""
