"""What a step costs on devices that are not there: compiled by XLA, read from its program."""
