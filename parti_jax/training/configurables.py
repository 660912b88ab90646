"""Imports whatever a run's gin files may name; names exist once their modules are imported."""

# pylint: disable=unused-import
from parti_jax.data import tasks
from parti_jax.training import generator_stage
from parti_jax.training import optimizers
from parti_jax.training import tokenizer_stage
from parti_jax.training import train_loop
