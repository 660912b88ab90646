"""Shared foundations: errors, files and stores, input checks, gin, fingerprints."""
