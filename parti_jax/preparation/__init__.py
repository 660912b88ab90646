"""Filters, deduplicates, resizes and encodes a source's pictures with an Apache Beam pipeline."""
