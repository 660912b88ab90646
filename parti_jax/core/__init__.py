"""What every part builds on: errors, files and stores, checks of input, gin, fingerprints."""
