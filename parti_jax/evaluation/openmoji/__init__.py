"""Judges drawings of OpenMoji's prompts by their pixels."""
