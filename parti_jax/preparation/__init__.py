"""Filters, deduplicates, resizes and encodes a source's pictures, as an Apache Beam pipeline."""
