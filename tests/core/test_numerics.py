"""Pictures, tokens, parameters and losses don't depend on JAX's global settings."""

import hashlib

import jax
import numpy as np
import optax
import pytest

from parti_jax.core import numerics
from parti_jax.core.errors import UserError
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import placement
from parti_jax.sampling import text_to_image
from parti_jax.training import optimizers
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import tokenizer_objective

DRAWS = {
  'x64': {'jax_enable_x64': True},
  'rbg': {'jax_default_prng_impl': 'rbg'},
  'partitionable': {'jax_threefry_partitionable': False},
}
OTHERS = {
  'promotion': {'jax_numpy_dtype_promotion': 'strict', 'jax_numpy_rank_promotion': 'raise'},
  'precision': {
    'jax_default_matmul_precision': 'bfloat16',
    'jax_softmax_custom_jvp': True,
    'jax_high_dynamic_range_gumbel': True,
  },
  'debugging': {
    'jax_debug_nans': True,
    'jax_debug_infs': True,
    'jax_debug_key_reuse': True,
    'jax_transfer_guard': 'disallow',
    'jax_disable_jit': True,
  },
}
EVERYTHING = {name: value for group in (DRAWS | OTHERS).values() for name, value in group.items()}


@pytest.fixture(name='config')
def _config():
  """Changes JAX's settings as environment variables would, until the test ends."""
  before = {name: getattr(jax.config, name) for name in (*EVERYTHING, 'jax_random_seed_offset')}

  def update(settings):
    for name, value in settings.items():
      jax.config.update(name, value)

  yield update
  update(before)


def _digest(*trees) -> str:
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(trees):
    leaf = np.asarray(leaf)
    digest.update(f'{leaf.dtype}{leaf.shape}'.encode() + leaf.tobytes())
  return digest.hexdigest()


def _drawn():
  """The demo model's pictures, scores, tokens and enlargements, from a newly loaded model."""
  model = text_to_image.load()
  result = model.generate(['red apple'], num_images=2, seed=3, rank=True)
  images = result.images[0]
  return _digest(
    result.images,
    result.tokens,
    result.scores,
    model.tokenize(images),
    model.reconstruct(images),
    model.upscale(images[:1, :16, :16]),
  )


@pytest.fixture(scope='module', name='drawn')
def _drawn_by_default():
  return _drawn()


@pytest.mark.parametrize(
  'settings', [*(DRAWS | OTHERS).values(), EVERYTHING], ids=[*DRAWS, *OTHERS, 'everything']
)
def test_pictures_are_the_same(settings, config, drawn):
  config(settings)
  assert _drawn() == drawn


OBJECTIVES = {
  'generator': generator_objective.GeneratorObjective(
    parti_config.PartiConfig(
      encoder_layers=1,
      decoder_layers=1,
      width=16,
      mlp_width=16,
      heads=2,
      text_vocabulary=16,
      text_length=4,
      codebook_size=24,
      grid=(2, 2),
      dropout=0.3,
      dtype='float32',
    )
  ),
  'tokenizer': tokenizer_objective.TokenizerObjective(
    vit_vqgan.ViTVQGANConfig(
      image_size=8,
      patch_size=4,
      encoder_layers=1,
      encoder_width=16,
      encoder_mlp_width=16,
      encoder_heads=2,
      decoder_layers=1,
      decoder_width=16,
      decoder_mlp_width=16,
      decoder_heads=2,
      codebook_size=16,
      code_dim=4,
      dtype='float32',
    ),
    revive_every=1,
    revive_until=5,
    dead_below=0.01,
    ema=0.9,
  ),
}


def _batch(name):
  draw = np.random.default_rng(0)
  if name == 'tokenizer':
    return {'images': draw.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)}
  return {
    'encoder_input_tokens': draw.integers(1, 16, (8, 4)).astype(np.int32),
    'decoder_target_tokens': draw.integers(0, 24, (8, 4)).astype(np.int32),
    'decoder_loss_weights': np.ones((8, 4), np.float32),
  }


def _trained(name):
  """Initial parameters, losses of three steps, the state after them, and an evaluation."""
  optimizer = {'generator': optimizers.adafactor, 'tokenizer': optimizers.adamw}[name]
  schedule = {
    'generator': optimizers.parti_schedule(1e-2, 2, 3, 4),
    'tokenizer': optimizers.warmup_cosine(1e-2, 1, 4),
  }[name]
  trainer = trainer_lib.Trainer(
    OBJECTIVES[name], optimizer(schedule), mesh_lib.make_mesh(devices=jax.devices()[:1]), seed=5
  )
  state, batch = trainer.create_state(), _batch(name)
  first, losses = jax.device_get(state.params), []
  for _ in range(3):
    state, metrics = trainer.step(state, trainer.put(batch))
    losses.append(np.asarray(metrics['loss']))
  measured = trainer.evaluate(state.params, [batch])
  return _digest(first, losses, state, sorted(measured.items())[0][1])


@pytest.fixture(scope='module', name='trained')
def _trained_by_default():
  return {name: _trained(name) for name in OBJECTIVES}


@pytest.mark.parametrize(
  'name, settings',
  [
    *(('generator', settings) for settings in DRAWS.values()),
    ('generator', EVERYTHING),
    ('tokenizer', EVERYTHING),
  ],
  ids=[*DRAWS, 'everything', 'tokenizer'],
)
def test_initial_parameters_and_losses_are_the_same(name, settings, config, trained):
  config(settings)
  assert _trained(name) == trained[name]


def test_cached_tokens_are_the_same_and_their_reader_keeps_its_settings(config):
  objective = OBJECTIVES['tokenizer']
  params = jax.device_get(
    jax.jit(
      lambda: jax.tree.map(
        lambda leaf: leaf.unbox(),
        objective.init(numerics.key(0)),
        is_leaf=lambda leaf: hasattr(leaf, 'unbox'),
      )
    )()
  )
  tokenizer = frozen_tokenizer.FrozenTokenizer('folder', objective.model, params)
  images = _batch('tokenizer')['images']
  right = frozen_tokenizer.Encoder(tokenizer)(images)()
  config(EVERYTHING)
  tokens = frozen_tokenizer.Encoder(tokenizer)(images)
  assert jax.config.jax_enable_x64 and jax.config.jax_default_prng_impl == 'rbg'
  np.testing.assert_array_equal(tokens(), right)


def test_results_are_fetched_within_the_settings(config, monkeypatch):
  config(EVERYTHING)
  fetched = []
  monkeypatch.setattr(jax, 'device_get', lambda x: fetched.append(jax.config.jax_enable_x64) or x)
  placement.Placement().run(jax.jit(lambda x: x), (), (np.ones(2, np.float32),))
  assert fetched == [False]


def test_settings_are_restored_after_an_error(config):
  config(EVERYTHING)
  with pytest.raises(ZeroDivisionError), numerics.fixed():
    assert not jax.config.jax_enable_x64 and jax.random.key(0).dtype == numerics.key(0).dtype
    raise ZeroDivisionError
  assert {name: getattr(jax.config, name) for name in EVERYTHING} == EVERYTHING


def test_an_offset_of_all_seeds_is_refused(config):
  config({'jax_random_seed_offset': 7})
  with pytest.raises(UserError, match='JAX_RANDOM_SEED_OFFSET=7 .*unset it'):
    trainer_lib.Trainer(OBJECTIVES['generator'], optax.sgd(1.0), mesh_lib.make_mesh())
