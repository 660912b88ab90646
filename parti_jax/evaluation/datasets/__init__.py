"""Captions and real pictures to evaluate on."""
