"""Imports whatever of a run gin files may name, besides the data, and how they are read and mixed.

Names exist once their modules are imported; those of the data are in `parti_jax.data.datasets`.
"""

# pylint: disable=unused-import
from parti_jax.data import mixtures
from parti_jax.training import generator_stage
from parti_jax.training import optimizers
from parti_jax.training import ranker_stage
from parti_jax.training import super_resolution_stage
from parti_jax.training import text_encoder_stage
from parti_jax.training import tokenizer_stage
from parti_jax.training import train_loop
