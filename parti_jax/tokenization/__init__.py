"""Writes a token cache: the image tokens of a source, computed once by a trained tokenizer."""
