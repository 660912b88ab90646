"""The Transformer kit: layers, attention, patterns, blocks and stacks."""
