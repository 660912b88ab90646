"""Reads parts that others have trained: their files, their names of parameters, their configs."""
