"""What the field added to the generator's training: z-loss, label smoothing, average, Muon."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import export
from parti_jax.core.errors import UserError
from parti_jax.models import parti
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import optimizers
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective

SIZES = tiny_configs.GENERATOR
OBJECTIVE = generator_objective.GeneratorObjective(
  SIZES, z_loss_weight=0.01, label_smoothing=0.1, ema=0.9
)
STEPS = 3


def _batch(step):
  draw = np.random.default_rng(step)
  weights = np.ones((8, 4), np.float32)
  weights[3, 2:] = 0
  return {
    'encoder_input_tokens': draw.integers(3, 16, (8, 4)).astype(np.int32),
    'decoder_target_tokens': draw.integers(0, 24, (8, 4)).astype(np.int32),
    'decoder_loss_weights': weights,
  }


@functools.cache
def _trainer(*sizes):
  mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  return trainer_lib.Trainer(OBJECTIVE, optimizers.muon(lambda step: 1e-2), mesh, seed=5)


def _stepped(trainer, state, first=0):
  """Trains until STEPS; returns the states and metrics of all steps from `first` on."""
  states, metrics = [jax.device_get(state)], []
  for step in range(first, STEPS):
    state, of_step = trainer.step(state, trainer.put(_batch(step)))
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(of_step))
  return states, metrics


@functools.cache
def _run(*sizes):
  trainer = _trainer(*sizes)
  return _stepped(trainer, trainer.create_state())


def _log_probabilities(logits):
  logits = np.asarray(logits, np.float64)
  log_normalizer = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  return logits - log_normalizer, log_normalizer[..., 0]


class _Focal(generator_objective.GeneratorObjective):
  """Adds a term, as a subclass outside of the package may."""

  def token_losses(self, logits, batch, regularized):
    found = super().token_losses(logits, batch, regularized)
    if regularized:
      found['focal_loss'] = -jnp.exp(-found['cross_entropy']) * found['cross_entropy']
    return found


def test_terms_of_the_loss_are_those_of_numpy():
  plain = generator_objective.GeneratorObjective(SIZES, depth_loss_weights=(1, 3))
  objective = _Focal(SIZES, z_loss_weight=0.01, label_smoothing=0.1, depth_loss_weights=(1, 3))
  params = random_parameters.of_objective(objective)
  # Logits with a mean and a normalizer far from those of random parameters.
  logits_kernel = params['image_decoder']['logits']['kernel']
  params['image_decoder']['logits']['kernel'] = 3 * logits_kernel
  batch = _batch(0)
  apply = functools.partial(parti.Parti(SIZES).apply, {'params': params})

  def logits_of_layers(texts, images):
    outputs = apply(texts, images, None, method='all_layer_outputs')
    return [apply(output, method='logits_from') for output in outputs]

  weights = batch['decoder_loss_weights']
  mean = lambda values: np.sum(values * weights) / weights.sum()
  targets, terms = np.eye(24)[batch['decoder_target_tokens']], []
  inputs = batch['encoder_input_tokens'], batch['decoder_target_tokens']
  for logits in jax.jit(logits_of_layers)(*inputs):
    log_p, log_normalizer = _log_probabilities(logits)
    cross_entropy = mean(-np.sum(targets * log_p, axis=-1))
    smoothed = mean(-np.sum((0.9 * targets + 0.1 / 24) * log_p, axis=-1))
    z_loss = 0.01 * mean(log_normalizer**2)
    log_p = np.sum(targets * log_p, axis=-1)
    terms.append([cross_entropy, smoothed - cross_entropy, z_loss, mean(np.exp(log_p) * log_p)])
  assert np.abs(np.diff(terms, axis=0)).min() > 1e-4  # The layers differ.
  loss, aux = jax.jit(objective.loss)(params, batch, None, 0)
  wanted = 0.25 * np.array(terms[0]) + 0.75 * np.array(terms[1])
  names = ('cross_entropy', 'smoothing_loss', 'z_loss', 'focal_loss')
  found = [aux['metrics'][name] for name in names]
  np.testing.assert_allclose(found, wanted, rtol=2e-4)
  np.testing.assert_allclose(loss, wanted.sum(), rtol=1e-5)
  np.testing.assert_allclose(aux['metrics']['last_layer_loss'], terms[1][0], rtol=1e-5)

  # The evaluation has none of it.
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.jit(objective.evaluate)(params, batch),
    jax.jit(plain.evaluate)(params, batch),
  )


@pytest.mark.parametrize('term', ['z_loss', 'smoothing_loss'])
def test_a_term_alone_is_the_only_one_reported(term):
  off = {'z_loss': {'label_smoothing': 0.0}, 'smoothing_loss': {'z_loss_weight': 0.0}}[term]
  objective = dataclasses.replace(OBJECTIVE, **off)
  params = nn.meta.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
  _, aux = jax.eval_shape(objective.loss, params, _batch(0), None, jnp.int32(0))
  assert aux['metrics'].keys() == {'token_accuracy', 'cross_entropy', term}


def test_off_they_add_nothing_to_the_state_and_metrics():
  objective = generator_objective.GeneratorObjective(SIZES)
  assert objective.initial_statistics() == {}
  params = nn.meta.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
  _, aux = jax.eval_shape(objective.loss, params, _batch(0), None, jnp.int32(0))
  assert aux['metrics'].keys() == {'token_accuracy'}


def test_the_terms_gather_no_logits_that_are_split_over_devices():
  mesh = mesh_lib.make_mesh(data=1, tensor=4, devices=jax.devices()[:4])
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, 'tensor'))
  targets = _batch(0)['decoder_target_tokens']

  def terms(logits):
    found = OBJECTIVE.token_losses(logits, {'decoder_target_tokens': jnp.asarray(targets)}, True)
    return sum(jnp.sum(found[name]) for name in ('cross_entropy', 'z_loss', 'smoothing_loss'))

  program = jax.jit(jax.value_and_grad(terms), in_shardings=split, out_shardings=(None, split))
  text = program.lower(jax.ShapeDtypeStruct((8, 4, 24), jnp.float32)).compile().as_text()
  assert 'all-reduce' in text and 'all-gather' not in text


def test_the_average_follows_the_parameters():
  states, _ = _run(1, 1, 1, 1)
  wanted = None
  for step, state in enumerate(states[1:]):
    decay = min(0.9, step / (step + 10))
    moved = lambda old, new, decay=decay: decay * old + (1 - decay) * new
    wanted = state.params if wanted is None else jax.tree.map(moved, wanted, state.params)
    found = state.statistics['average']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted)
  logits = lambda params: params['image_decoder']['logits']['kernel']
  averaged = state_lib.averaged(states[-1])
  assert np.any(logits(averaged) != logits(states[-1].params))
  # Before the first step, it is the initial parameters.
  jax.tree.map(np.testing.assert_array_equal, states[0].statistics['average'], states[0].params)


def test_frozen_parts_have_neither_an_average_nor_moments_and_do_not_move():
  objective = dataclasses.replace(OBJECTIVE, frozen=('text_encoder',))
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  trainer = trainer_lib.Trainer(objective, optimizers.muon(1e-2), mesh)
  assert trainer.abstract.statistics['average'].keys() == {'image_decoder'}
  paths = run_checkpoints.by_path(trainer.abstract.optimizer_state)
  assert any('image_decoder' in path for path in paths)
  assert not any('text_encoder' in path for path in paths)


@pytest.mark.parametrize('sizes', [(2, 2, 2, 1), (1, 2, 2, 2)])
def test_meshes_agree(sizes):
  states, metrics = _run(1, 1, 1, 1)
  others, of_others = _run(*sizes)
  for ours, theirs in zip(of_others, metrics):
    assert ours.keys() == theirs.keys() >= {'cross_entropy', 'z_loss', 'smoothing_loss'}
    for name, value in theirs.items():
      if name != 'token_accuracy':
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[0].params, states[-1].params)
  assert min(jax.tree.leaves(moved)) > 5e-3
  # AdamW turns gradients near 0, which differ by rounding, into steps of the learning rate.
  for of_parts in (lambda state: state.params, lambda state: state.statistics['average']):
    ours, theirs = of_parts(others[-1]), of_parts(states[-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), ours, theirs)


def test_the_state_is_split_like_the_parameters():
  abstract = _trainer(2, 2, 2, 1).abstract
  of_params = run_checkpoints.by_path(abstract.params)
  kinds = {'statistics/average/': 0, '/mu/': 0, '/nu/': 0}
  for path, leaf in run_checkpoints.by_path(abstract).items():
    if path.startswith('params/') or not leaf.shape or path.endswith('ns_coeffs'):
      continue
    (kind,) = [kind for kind in kinds if kind in path]
    assert leaf.sharding == of_params[path.split(kind)[1]].sharding, path
    kinds[kind] += not leaf.sharding.is_fully_replicated
  assert min(kinds.values()) >= 6, kinds


def test_a_checkpoint_goes_on_bit_for_bit_and_exports_the_average(tmp_path, capsys):
  states, metrics = _run(1, 1, 1, 1)
  trainer, model = _trainer(1, 1, 1, 1), run_checkpoints.describe(OBJECTIVE)
  manager = checkpoint_manager.Checkpoints(tmp_path)
  manager.save(2, jax.device_put(states[2], trainer.shardings), {}, model)
  manager.close()
  manager = checkpoint_manager.Checkpoints(tmp_path)
  state, _ = manager.restore(2, trainer.abstract, model)
  manager.close()
  plain = dataclasses.replace(OBJECTIVE, ema=0.0)
  without = trainer_lib.Trainer(plain, trainer.optimizer, trainer.mesh)
  with pytest.raises(UserError, match="statistics/average/.* or restore the objective's ema$"):
    run_checkpoints.check_same_shapes(tmp_path / 'checkpoints' / '2', without.abstract)
  resumed, again = _stepped(trainer, state, 2)
  jax.tree.map(np.testing.assert_array_equal, resumed[-1], states[-1])
  jax.tree.map(np.testing.assert_array_equal, again[-1], metrics[-1])

  part, origin = export._trained('generator', tmp_path, None)
  assert origin == {'generator_steps': 2} and part.config == SIZES
  jax.tree.map(np.testing.assert_array_equal, part.params, states[2].statistics['average'])
  out = capsys.readouterr().out
  assert f'--generator={tmp_path}: taking the moving average of image_decoder, text_encoder' in out


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'ema': 1.0}, 'GeneratorObjective.ema=1.0 must be at least 0 and below 1'),
    ({'label_smoothing': -0.1}, 'GeneratorObjective.label_smoothing=-0.1 must be'),
    ({'label_smoothing': 1}, 'GeneratorObjective.label_smoothing=1.* must be'),
    ({'z_loss_weight': -1e-4}, 'GeneratorObjective.z_loss_weight=-0.0001'),
    ({'z_loss_weight': 'much'}, 'GeneratorObjective.z_loss_weight'),
  ],
)
def test_values_that_can_not_be_are_named(changes, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(OBJECTIVE, **changes)


@pytest.mark.parametrize(
  'changes',
  [{'ema': 1.0}, {'frozen': ('x',)}, {'depth_loss_weights': (1,)}, {'text_features': 'x'}],
)
def test_errors_name_the_subclass(changes):
  (field,) = changes
  with pytest.raises(UserError, match=rf'^_Focal\.{field}\b'):
    _Focal(SIZES, **changes)
