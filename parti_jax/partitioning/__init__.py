"""The device mesh and the rules that bind logical axes to it."""
