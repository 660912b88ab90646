"""The text encoder's pretraining: losses by formula, any mesh, learning, and Parti's start."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import random_parameters

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import fingerprints
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.models import coca
from parti_jax.models import masked_language
from parti_jax.models import parti_config
from parti_jax.models import text_pretraining
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import optimizers
from parti_jax.training import run as run_lib
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import initial_text_encoder
from parti_jax.training.objectives import text_encoder_objective

BATCH = 16
RUN = 'gin_configs/runs/tiny_text_encoder.gin'
MODEL = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=1,
  width=16,
  mlp_width=32,
  heads=4,
  text_vocabulary=24,
  text_length=8,
  codebook_size=6,
  grid=(1, 2),
  dropout=0.3,
  dtype='float32',
)
IMAGE = coca.CoCaConfig(
  image_size=8,
  patch_size=4,
  image_layers=1,
  unimodal_layers=1,
  multimodal_layers=1,
  width=16,
  mlp_width=32,
  heads=4,
  caption_queries=1,
  feature_dim=8,
  text_vocabulary=24,
  text_length=8,
  dropout=0.3,
  dtype='float32',
)
MASKED = text_encoder_objective.TextEncoderObjective(MODEL)
BOTH = text_encoder_objective.TextEncoderObjective(MODEL, IMAGE, 1.0, 0.5)


def _batch():
  draw = np.random.default_rng(0)
  texts = draw.integers(3, 24, (BATCH, 8)).astype(np.int32)
  for row, pieces in enumerate(draw.integers(0, 8, BATCH)):
    texts[row, pieces], texts[row, pieces + 1 :] = 1, 0
  texts[0, :4] = [4, 5, 1, 0]
  return {
    'encoder_input_tokens': texts,
    'images': draw.integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8),
  }


def _stepped(objective, sizes=(1, 1, 1, 1), microbatches=1):
  """State and metrics of a step of plain gradient descent, numpy arrays."""
  batch = (
    _batch()
    if objective.contrastive_weight
    else {'encoder_input_tokens': _batch()['encoder_input_tokens']}
  )
  mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  trainer = trainer_lib.Trainer(objective, optax.sgd(2.0), mesh, 5, microbatches)
  state, metrics = trainer.step(trainer.create_state(), trainer.put(batch))
  return jax.device_get(state), jax.device_get(metrics)


def _assert_same(ours, theirs):
  (state, metrics), (other, others) = ours, theirs
  assert metrics.keys() == others.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, rtol=1e-4, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max()),
    state.params,
    other.params,
  )


def test_both_losses_are_the_same_on_a_mesh_of_eight_devices():
  # Masks and dropout as well, and negatives of pairs that lie on other devices.
  params = random_parameters.of_objective(BOTH)
  found = []
  for sizes in ((1, 1, 1, 1), (4, 1, 2, 1)):
    mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    trainer = trainer_lib.Trainer(BOTH, optax.sgd(1.0), mesh)
    with rules.partitioned(mesh, trainer.rules):
      loss = jax.jit(
        lambda params, batch: BOTH.loss(
          params, batch, layers.dropout_keys(jax.random.key(1), BATCH), jnp.int32(0)
        )[1]['metrics'],
        in_shardings=(trainer.shardings.params, trainer.batch_sharding),
      )
      found.append(jax.device_get(loss(jax.device_get(params), _batch())))
  assert found[0].keys() == found[1].keys() >= {'masked_loss', 'contrastive_loss'}
  for name, value in found[0].items():
    np.testing.assert_allclose(found[1][name], value, rtol=2e-5, err_msg=name)


def test_masked_language_modelling_is_the_same_in_microbatches():
  _assert_same(_stepped(MASKED), _stepped(MASKED, (2, 1, 1, 1), microbatches=4))


def test_the_parts_of_the_loss_by_formula():
  params = random_parameters.of_objective(BOTH)
  batch = {name: jnp.asarray(value) for name, value in _batch().items()}
  keys = layers.dropout_keys(jax.random.key(2), BATCH)
  loss, aux = jax.jit(BOTH.loss)(params, batch, keys, 0)
  metrics = aux['metrics']
  np.testing.assert_allclose(
    loss, metrics['masked_loss'] + 0.5 * metrics['contrastive_loss'], rtol=1e-6
  )
  texts = batch['encoder_input_tokens']
  module = text_pretraining.TextPretraining(MODEL, True, IMAGE)
  text = masked_language.mask_text(texts, layers.fold(keys, 0), 24)
  piece_logits = jax.jit(
    lambda params, text, keys: module.apply({'params': params}, text, keys, method='piece_logits')
  )
  logits = np.asarray(piece_logits(params, text, layers.fold(keys, 1)), np.float64)
  chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  losses = [
    -np.log(chance[row, k, texts[row, place]])
    for row in range(BATCH)
    for k, place in enumerate(text.places[row])
    if text.weights[row, k]
  ]
  assert MASKED.weight(batch) == len(losses) and BOTH.weight(batch) == BATCH
  np.testing.assert_allclose(metrics['masked_loss'], np.mean(losses), rtol=1e-5)
  # The hidden pieces themselves are not looked at.
  hidden = text.replace(tokens=jnp.where(text.masked, 9, text.tokens))
  np.testing.assert_allclose(piece_logits(params, hidden, layers.fold(keys, 1)), logits, atol=1e-5)


def test_evaluation_masks_a_text_the_same_in_every_batch():
  batch = {'encoder_input_tokens': _batch()['encoder_input_tokens']}
  trainer = trainer_lib.Trainer(
    MASKED, optax.sgd(1.0), mesh_lib.make_mesh(devices=jax.devices()[:2])
  )
  params = trainer.create_state().params
  half = lambda rows: {'encoder_input_tokens': batch['encoder_input_tokens'][rows]}
  whole = trainer.evaluate(params, iter([batch]))
  parts = trainer.evaluate(params, iter([half(slice(0, 10)), half(slice(10, None))]))
  assert whole.keys() == {'loss', 'masked_loss', 'masked_accuracy'}
  for name, value in whole.items():
    assert parts[name] == pytest.approx(value, rel=1e-5)


def test_it_learns_a_tiny_text():
  # Every text repeats its own piece, so that a hidden one follows from its neighbors.
  texts = np.tile(np.arange(3, 19, dtype=np.int32)[:, None], (1, 8))
  texts[:, 7] = 1
  objective = dataclasses.replace(MASKED, model=dataclasses.replace(MODEL, dropout=0.0))
  trainer = trainer_lib.Trainer(
    objective, optimizers.adamw(lambda step: 1e-2), mesh_lib.make_mesh(devices=jax.devices()[:1])
  )
  state, batch = trainer.create_state(), {'encoder_input_tokens': texts}
  before = trainer.evaluate(state.params, iter([batch]))
  for _ in range(60):
    state, _ = trainer.step(state, trainer.put(batch))
  after = trainer.evaluate(state.params, iter([batch]))
  assert before['masked_loss'] > 2.5
  assert after['masked_loss'] < 1.0 and after['masked_accuracy'] > 0.9


def _captions_alone(folder):
  """A captions file of pictures that are not there, and the bindings of a run on it."""
  lines = [json.dumps({'file': f'{i}.png', 'caption': f'square {i} red'}) for i in range(16)]
  (folder / 'captions.jsonl').write_text('\n'.join(lines))
  return [
    f"folder.path = '{folder}'",
    "train.task = 'texts'",
    'train.steps = 2',
    'TextEncoderObjective.contrastive_weight = 0',
    'PartiConfig.encoder_layers = 1',
  ]


def test_parti_starts_with_exactly_the_encoder_of_a_run_that_needs_no_pictures(tmp_path):
  gin_config.parse([RUN], _captions_alone(tmp_path))
  metrics = train_loop.train(str(tmp_path / 'encoder'))
  assert metrics['masked_loss'] > 0 and 'contrastive_loss' not in metrics
  trained = ocp.StandardCheckpointer().restore(
    run_checkpoints.latest_checkpoint(tmp_path / 'encoder') / 'state'
  )['params']
  assert set(trained) == {'text_encoder', 'masked_head'}

  model = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=1,
    width=32,
    mlp_width=64,
    heads=4,
    text_vocabulary=2000,
    text_length=32,
    codebook_size=8,
    grid=(1, 2),
    dtype='float32',
  )
  objective = generator_objective.GeneratorObjective(model, text_encoder=str(tmp_path / 'encoder'))
  trainer = trainer_lib.Trainer(objective, optax.sgd(1.0), mesh_lib.make_mesh(4, 1, 2, 1))
  inputs = inputs_lib.Inputs(objective, {}, False)
  run = run_lib.Run(
    trainer,
    tmp_path / 'generator',
    1,
    iter(()),
    inputs,
    train_loop.initial_parts(trainer, tmp_path / 'generator', inputs),
  )
  jax.tree.map(
    np.testing.assert_array_equal, run.state.params['text_encoder'], trained['text_encoder']
  )
  shardings = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
  assert shardings(run.state.params) == shardings(trainer.abstract.params)

  # What does not fit is named before anything is trained.
  other = dataclasses.replace(model, width=64)
  with pytest.raises(UserError, match='G.text_encoder=.*width is 32 there and 64 here'):
    initial_text_encoder.parts(str(tmp_path / 'encoder'), other, None, inputs, 'G.text_encoder')
  other = dataclasses.replace(model, norm='rms')
  with pytest.raises(UserError, match='G.text_encoder=.*norm is layer there and rms here'):
    initial_text_encoder.parts(str(tmp_path / 'encoder'), other, None, inputs, 'G.text_encoder')
  ours = {'vocabulary': fingerprints.Fingerprint('0123', "vocabulary.path='ours'")}
  theirs = datasets.get_vocabulary().fingerprint
  with pytest.raises(
    UserError,
    match=f"G.text_encoder='.*' was made with the vocabulary {theirs}, "
    "but vocabulary.path='ours' has 0123; set vocabulary.path",
  ):
    initial_text_encoder.parts(
      str(tmp_path / 'encoder'),
      model,
      None,
      inputs_lib.Inputs(objective, ours, False),
      'G.text_encoder',
    )
  with pytest.raises(UserError, match='no training run there'):
    initial_text_encoder.parts(str(tmp_path / 'nothing'), model, None, inputs, 'G.text_encoder')
  assert initial_text_encoder.parts(None, model, None, inputs, 'G.text_encoder') == {}


@pytest.mark.parametrize(
  'values, message',
  [
    ({'masked_weight': 0.0}, 'one must be above 0'),
    ({'masked_weight': -1.0}, 'masked_weight=-1.0 .* may be negative'),
    ({'contrastive_weight': 1.0}, r'TextEncoderObjective\.image = @CoCaConfig'),
  ],
)
def test_weights_that_make_no_loss(values, message):
  with pytest.raises(UserError, match=message):
    text_encoder_objective.TextEncoderObjective(MODEL, **values)


def test_the_encoder_has_the_parameters_of_partis():
  names = lambda tree: {
    jax.tree_util.keystr(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  ours = jax.eval_shape(MASKED.init, jax.random.key(0))
  partis = jax.eval_shape(generator_objective.GeneratorObjective(MODEL).init, jax.random.key(0))
  assert names(ours['text_encoder']) == names(partis['text_encoder'])
  assert set(ours) == {'text_encoder', 'masked_head'}
