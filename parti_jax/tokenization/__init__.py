"""Writes the image tokens of a source, made once by a trained tokenizer."""
