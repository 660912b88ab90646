"""Reads networks that others have trained: their files, parameter names and configs."""
