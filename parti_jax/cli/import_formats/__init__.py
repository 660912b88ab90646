"""The formats of public weights that `parti-jax import` reads, a module for each part."""
