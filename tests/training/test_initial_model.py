"""A run that starts with the parameters of an exported model."""

import jax
import numpy as np
import pytest

from parti_jax.errors import UserError
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh
from parti_jax.partitioning import rules
from parti_jax.sampling import model_folder
from parti_jax.sampling import pipeline
from parti_jax.training import checkpoints
from parti_jax.training import generator_stage
from parti_jax.training import optimizers
from parti_jax.training import state


def abstract_params(stage):
  optimizer = optimizers.adamw(lambda step: 1e-3)
  two_by_four = mesh.make_mesh(data=4, tensor=2)
  return state.abstract_state(stage, optimizer, two_by_four, rules.logical_axis_rules()).params


def test_the_shipped_model_is_put_on_the_mesh_as_it_is():
  model = model_folder.load(pipeline.DEMO_FOLDER)
  stage = generator_stage.GeneratorStage(model.parti_config)
  abstract = abstract_params(stage)
  params = checkpoints.read_model_folder(pipeline.DEMO_FOLDER, stage, abstract)
  jax.tree.map(np.testing.assert_array_equal, params, model.parti_params)
  assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding,
                                   params, abstract))


def test_a_model_of_other_sizes_is_refused():
  stage = generator_stage.GeneratorStage(parti_config.PartiConfig(width=64, heads=2))
  with pytest.raises(UserError, match='width is 192 there and 64 here'):
    checkpoints.read_model_folder(pipeline.DEMO_FOLDER, stage, None)
