"""A run that starts with the parameters of an exported model, or with parts of another run."""

from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_configs

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh
from parti_jax.partitioning import rules
from parti_jax.sampling import text_to_image
from parti_jax.training import inputs
from parti_jax.training import optimizers
from parti_jax.training import run as run_lib
from parti_jax.training import state
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import tokenizer_objective


def abstract_params(objective):
  optimizer = optimizers.adamw(lambda step: 1e-3)
  two_by_four = mesh.make_mesh(data=4, tensor=2)
  return state.abstract_state(objective, optimizer, two_by_four, rules.logical_axis_rules()).params


def test_the_shipped_model_is_put_on_the_mesh_as_it_is():
  model = model_folder.load(text_to_image.DEMO_FOLDER)
  objective = generator_objective.GeneratorObjective(model.generator_config)
  abstract = abstract_params(objective)
  params = run_checkpoints.read_model_folder(
    text_to_image.DEMO_FOLDER, objective, abstract, inputs.Inputs(objective, {}, False)
  )
  jax.tree.map(np.testing.assert_array_equal, params, model.generator_params)
  assert jax.tree.all(
    jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, params, abstract)
  )


def test_a_model_of_other_sizes_is_refused():
  objective = generator_objective.GeneratorObjective(parti_config.PartiConfig(width=64, heads=2))
  with pytest.raises(UserError, match='width is 192 there and 64 here'):
    run_checkpoints.read_model_folder(
      text_to_image.DEMO_FOLDER, objective, None, inputs.Inputs(objective, {}, False)
    )


def test_a_folder_with_the_network_alone_is_enough(tmp_path):
  shapes = nn.meta.unbox(model_folder.abstract('tokenizer', tiny_configs.TOKENIZER))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
  part = model_folder.Part(tiny_configs.TOKENIZER, params)
  folder = model_folder.save_part(tmp_path / 'alone', 'tokenizer', part, {})
  objective = tokenizer_objective.TokenizerObjective(tiny_configs.TOKENIZER)
  nothing = inputs.Inputs(objective, {}, False)
  found = run_checkpoints.read_model_folder(folder, objective, abstract_params(objective), nothing)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  generator = generator_objective.GeneratorObjective(parti_config.PartiConfig(width=64, heads=2))
  with pytest.raises(UserError, match='train.initial_model=.* has no generator, only a tokenizer'):
    run_checkpoints.read_model_folder(folder, generator, None, nothing)


class _Borrower(generator_objective.GeneratorObjective):
  """Takes its text encoder from somewhere."""

  asked = 0

  def initial_parts(self, abstract_params, inputs):
    assert inputs.state() == dict.fromkeys(('vocabulary', 'tokenizer', 'text_encoder'))
    type(self).asked += 1
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape), abstract_params['text_encoder'])
    return {'text_encoder': run_checkpoints.put_like(ones, abstract_params['text_encoder'])}


def test_an_objective_may_take_parts_from_elsewhere(tmp_path):
  sizes = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=1,
    width=8,
    mlp_width=16,
    heads=2,
    text_vocabulary=8,
    text_length=3,
    codebook_size=6,
    grid=(1, 2),
    dtype='float32',
  )
  trainer = trainer_lib.Trainer(
    _Borrower(sizes), optimizers.adamw(lambda step: 1e-3), mesh.make_mesh(data=4, tensor=2)
  )
  examples = mock.MagicMock(state=lambda: {})
  nothing = inputs.Inputs(trainer.objective, {}, False)
  parts = train_loop.initial_parts(trainer, tmp_path, nothing)
  assert list(parts) == ['text_encoder']
  run = run_lib.Run(trainer, tmp_path, 1, examples, nothing, parts)
  begun = jax.device_get(run.state.params)
  assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(begun['text_encoder']))
  random = jax.device_get(trainer.create_state().params['image_decoder'])
  jax.tree.map(np.testing.assert_array_equal, begun['image_decoder'], random)
  assert np.std(random['logits']['kernel']) > 0
  run.save()
  run.close()
  # Another class of the same name and sizes may go on.
  lines = []
  for kind in (_Borrower, generator_objective.GeneratorObjective):
    trainer = trainer_lib.Trainer(kind(sizes), trainer.optimizer, trainer.mesh)
    resumed = run_lib.Run(trainer, tmp_path, 1, examples, nothing)
    resumed.close()
    lines.append(resumed.beginning())
  assert '_Borrower' not in lines[0]
  assert 'its checkpoint is of the objective _Borrower, which is now GeneratorObj' in lines[1]
  # A run that has begun asks for nothing: where its parts were from may be gone.
  assert train_loop.initial_parts(trainer, tmp_path, nothing, 'nowhere') == {}
  assert _Borrower.asked == 1
