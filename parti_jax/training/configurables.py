"""Imports the modules that register the names of gin files, except those of the data.

`parti_jax.data.datasets` registers the names of the data.
"""

from parti_jax.data import mixtures
from parti_jax.partitioning import compiler_options
from parti_jax.partitioning import mesh
from parti_jax.training import config
from parti_jax.training import optimizers
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import imported_generator
from parti_jax.training.objectives import lora_objective
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import super_resolution_objective
from parti_jax.training.objectives import text_encoder_objective
from parti_jax.training.objectives import tokenizer_objective
