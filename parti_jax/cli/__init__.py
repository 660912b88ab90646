"""The commands of `parti-jax`."""
