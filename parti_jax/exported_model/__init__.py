"""Reads and writes exported models: folders with configs, parameters, vocabulary and defaults."""
