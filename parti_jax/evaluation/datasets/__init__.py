"""Captions and real pictures for evaluation."""
