"""Adversarial training of the tokenizer: its losses by definition, and its step as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.core.errors import UserError
from parti_jax.models import discriminator
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import optimizers
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import tokenizer_objective

SIZES = dataclasses.replace(tiny_configs.TOKENIZER, codebook_size=16, code_dim=4)
JUDGE = discriminator.DiscriminatorConfig(channels=32, max_channels=4, minibatch_group=1)
OBJECTIVE = tokenizer_objective.TokenizerObjective(
  SIZES,
  adversarial_weight=0.5,
  discriminator=JUDGE,
  adversarial_from=2,
  r1_every=2,
  ema=0.9,
  discriminator_optimizer=optimizers.adamw(1e-3, beta1=0.0, weight_decay=0.01),
  revive_every=2,
  revive_until=10,
)


def _images(count=8, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope='module')
def params():
  return random_parameters.of_objective(OBJECTIVE)


def test_both_losses_by_formula_and_each_moves_its_own_side(params):
  real, drawn = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 4, 8, 8, 3)), jnp.float32)
  judge = params['discriminator']

  @jax.jit
  def gradients(judge, drawn):
    losses = lambda judge, drawn: adversarial.losses(JUDGE, judge, real, drawn)
    each = [jax.grad(lambda *x, i=i: losses(*x)[i], argnums=(0, 1))(judge, drawn) for i in (0, 1)]
    return losses(judge, drawn), each

  (of_drawn, of_judge, shown), each = gradients(judge, drawn)
  logits = [
    np.asarray(discriminator.Discriminator(JUDGE).apply({'params': judge}, x), np.float64)
    for x in (real, drawn)
  ]
  softplus = lambda x: np.log1p(np.exp(x))
  np.testing.assert_allclose(of_drawn, softplus(-logits[1]).mean(), rtol=1e-5)
  np.testing.assert_allclose(
    of_judge, softplus(logits[1]).mean() + softplus(-logits[0]).mean(), rtol=1e-5
  )
  np.testing.assert_allclose(shown['logits_real'], logits[0].mean(), rtol=1e-5)
  moved = lambda tree: any(np.any(leaf) for leaf in jax.tree.leaves(tree))
  assert [[moved(side) for side in pair] for pair in each] == [[False, True], [True, False]]


def test_r1_is_the_squared_gradient_by_pixels(params):
  images = np.random.default_rng(1).uniform(0.2, 0.8, size=(2, 8, 8, 3)).astype(np.float32)
  judge = {'params': params['discriminator']}
  logit = jax.jit(discriminator.Discriminator(JUDGE).apply)
  steps = 2e-3 * np.eye(192, dtype=np.float32).reshape(192, 8, 8, 3)
  squares = [
    np.sum(((logit(judge, image + steps) - logit(judge, image - steps)) / 4e-3) ** 2)
    for image in images
  ]
  found = jax.jit(lambda judge: adversarial.r1_penalty(JUDGE, judge, jnp.asarray(images)))(
    judge['params']
  )
  np.testing.assert_allclose(found, np.mean(squares), rtol=2e-2)
  assert found > 1e-6


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(params):
  images = jnp.asarray(_images(4))
  objective = dataclasses.replace(OBJECTIVE, adversarial_adaptive=True, adversarial_from=0)
  keep = dataclasses.replace(OBJECTIVE, adversarial_weight=0.0, quantizer_weight=0.0)

  def of_rest(kernel):
    return keep.loss(_with_last(params, kernel), {'images': images}, None, jnp.int32(1))[0]

  def of_adversary(kernel):
    out = vit_vqgan.ViTVQGAN(SIZES).apply(
      {'params': _with_last(params, kernel)}, images / jnp.float32(255)
    )
    return adversarial.losses(
      JUDGE, params['discriminator'], images / jnp.float32(255), vit_vqgan.to_pixels(out['mean'])
    )[0]

  kernel = params['decoder']['project_patches']['kernel']
  rest, of_judge = jax.jit(lambda k: (jax.grad(of_rest)(k), jax.grad(of_adversary)(k)))(kernel)
  wanted = np.linalg.norm(rest) / (np.linalg.norm(of_judge) + 1e-6)
  _, aux = jax.jit(objective.loss)(params, {'images': images}, None, 1)
  np.testing.assert_allclose(aux['metrics']['adversarial_weight'], 0.5 * wanted, rtol=1e-4)


def _with_last(params, kernel):
  return params | {'decoder': params['decoder'] | {'project_patches': {'kernel': kernel}}}


def _trainer(microbatches, mesh):
  return trainer_lib.Trainer(OBJECTIVE, optimizers.adamw(lambda step: 1e-2), mesh, 3, microbatches)


def _stepped(trainer, state, first=0, last=4):
  """The states before and after each step, on the host, and their metrics."""
  states, metrics = [jax.device_get(state)], []
  for step in range(first, last):
    state, values = trainer.step(state, trainer.put({'images': _images(seed=step)}))
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(values))
  return states, metrics


@pytest.fixture(scope='module')
def trainer():
  return _trainer(1, mesh_lib.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope='module')
def run(trainer):
  return _stepped(trainer, trainer.create_state())


def test_the_discriminator_rests_until_it_begins(run):
  states, metrics = run
  judges = [
    (
      state.params['discriminator'],
      state.optimizer_state.inner_states['discriminator'].inner_state.inner_state,
    )
    for state in states
  ]
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
  # Weight decay and Adam's counters rest too, so that the first step is a first step.
  assert same(judges[0], judges[2]) and not same(judges[2][0], judges[3][0])
  assert [values['adversarial'] != 0 for values in metrics] == [False, False, True, True]
  assert [values['discriminator_gradient_norm'] > 0 for values in metrics] == [
    False,
    False,
    True,
    True,
  ]
  # R1 at every second step, and its last value is shown in between.
  assert [values['r1'] > 0 for values in metrics] == [False, False, True, True]
  assert metrics[2]['r1'] == metrics[3]['r1']
  # What is shown as the loss is the tokenizer's.
  last = metrics[3]
  np.testing.assert_allclose(
    last['loss'],
    last['quantizer_loss'] + last['l2'] + 0.1 * last['logit_laplace'] + 0.5 * last['adversarial'],
    rtol=1e-5,
  )


def test_the_average_follows_the_tokenizers_weights(run):
  states, _ = run
  wanted = None
  for step, state in enumerate(states[1:]):
    params = {name: state.params[name] for name in tokenizer_objective.PARTS}
    decay = min(0.9, step / (step + 10))
    # From before the step's revival of codes, whose average starts over.
    wanted = (
      params
      if wanted is None
      else jax.tree.map(
        lambda old, new, decay=decay: decay * old + (1 - decay) * new, wanted, params
      )
    )
    found = state.statistics['average']
    moved = np.any(
      state.params['quantizer']['codebook']['table'] != found['quantizer']['codebook']['table'],
      axis=1,
    )
    table = wanted['quantizer']['codebook']['table']
    wanted['quantizer'] = {
      'codebook': {
        'table': np.where(moved[:, None], table, state.params['quantizer']['codebook']['table'])
      }
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
  averaged = state_lib.averaged(states[-1])
  assert averaged.keys() == states[-1].params.keys()
  np.testing.assert_array_equal(
    averaged['decoder']['project_codes']['kernel'], found['decoder']['project_codes']['kernel']
  )
  assert np.any(
    averaged['decoder']['project_codes']['kernel']
    != states[-1].params['decoder']['project_codes']['kernel']
  )


def test_mesh_and_microbatches_change_nothing(run):
  other = _trainer(2, mesh_lib.make_mesh(data=2, fsdp=2, tensor=2))
  states, metrics = _stepped(other, other.create_state())
  for ours, theirs in zip(metrics, run[1]):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value, rtol=2e-3, atol=1e-5, err_msg=name)
  # Adam turns gradients near 0, which differ by rounding, into steps of the learning rate.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
    states[-1].statistics,
    run[0][-1].statistics,
  )


def test_a_checkpoint_goes_on_bit_for_bit_and_draws_with_the_average(run, trainer, tmp_path):
  states, _ = run
  manager = checkpoint_manager.Checkpoints(tmp_path)
  model = run_checkpoints.describe(OBJECTIVE)
  manager.save(3, jax.device_put(states[3], trainer.shardings), {}, model)
  manager.close()
  manager = checkpoint_manager.Checkpoints(tmp_path)
  state, _ = manager.restore(3, trainer.abstract, model)
  manager.close()
  resumed, _ = _stepped(trainer, state, 3)
  jax.tree.map(np.testing.assert_array_equal, resumed[-1], states[-1])
  # The discriminator is no part of what draws.
  found = frozen_tokenizer.load(tmp_path)
  assert found.config == SIZES
  jax.tree.map(np.testing.assert_array_equal, found.params, states[3].statistics['average'])


def test_without_any_of_it_the_state_is_what_it_was():
  """Runs from before there was a discriminator go on."""
  objective, optimizer = (
    tokenizer_objective.TokenizerObjective(SIZES),
    optimizers.adamw(lambda step: 1e-2),
  )
  trainer = trainer_lib.Trainer(objective, optimizer, mesh_lib.make_mesh())
  assert trainer.optimizer is optimizer
  assert trainer.abstract.params.keys() == set(tokenizer_objective.PARTS)
  assert trainer.abstract.statistics.keys() == {'code_use'}
  assert trainer.constants == {}


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'perceptual_weight': 0.1}, 'perceptual_weight: LPIPS needs images of at least 16 pixels'),
    ({'r1_every': 0}, 'TokenizerObjective.r1_every=0 must be at least 1'),
    ({'ema': 1.0}, 'TokenizerObjective.ema=1.0 must be'),
    ({'model': dataclasses.replace(SIZES, image_size=12)}, 'size of 12 is not a power of two'),
  ],
)
def test_settings_that_do_not_go_together_are_named(changes, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(OBJECTIVE, **changes)


def test_files_of_weights_are_asked_for_before_training_begins():
  larger = dataclasses.replace(SIZES, image_size=16)
  objective = tokenizer_objective.TokenizerObjective(larger, perceptual_weight=0.1)
  with pytest.raises(UserError, match='needs the file TokenizerObjective.vgg16_weights'):
    objective.constants()
  # A plan needs none.
  assert jax.tree.leaves(objective.abstract_constants())[0].dtype == jnp.float32
