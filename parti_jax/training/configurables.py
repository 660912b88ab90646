"""Imports whatever of a run gin files may name, besides the data, and how they are read and mixed.

Names exist once their modules are imported; those of the data are in `parti_jax.data.datasets`.
"""

from parti_jax.data import mixtures
from parti_jax.training import config
from parti_jax.training import optimizers
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import super_resolution_objective
from parti_jax.training.objectives import text_encoder_objective
from parti_jax.training.objectives import tokenizer_objective
