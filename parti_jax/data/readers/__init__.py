"""Readers of files that hold captions or captioned pictures."""
