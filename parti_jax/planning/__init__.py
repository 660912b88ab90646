"""Predicts what a step costs on other devices, by compiling it and reading XLA's program."""
