"""Measures over sets of pictures: Fréchet distance, precision and recall, inception score."""
