"""Judges pictures of OpenMoji's prompts by their pixels."""
