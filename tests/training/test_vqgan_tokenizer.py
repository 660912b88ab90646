"""Training convolutional tokenizers with each quantizer, by the objective and by the commands."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core import fingerprints
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache_info
from parti_jax.exported_model import model_folder
from parti_jax.models import discriminator
from parti_jax.models import image_tokenizers
from parti_jax.models import kinds
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.models import vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import text_to_image
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import inputs
from parti_jax.training import optimizers
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import revival
from parti_jax.training.objectives import tokenizer_objective

JUDGE = discriminator.DiscriminatorConfig(channels=32, max_channels=4, minibatch_group=1)


def _config(quantizer='cosine', **changes):
  return dataclasses.replace(
    tiny_configs.VQGAN, quantizer=quantizer, **tiny_configs.QUANTIZERS[quantizer], **changes
  )


def _objective(config, **changes):
  weight = 0.1 if config.predicts_scale else 0.0
  return tokenizer_objective.TokenizerObjective(config, logit_laplace_weight=weight, **changes)


def _trainer(objective, rate=3e-3):
  one_device = mesh_lib.make_mesh(devices=jax.devices()[:1])
  optimizer = optimizers.adamw(lambda step: rate, weight_decay=0.0)
  return trainer_lib.Trainer(objective, optimizer, one_device)


def _images(count=4):
  """Pictures of four squares, each of one color."""
  colors = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3)).astype(np.uint8)
  return colors.repeat(4, 1).repeat(4, 2)


@pytest.mark.parametrize('quantizer', tiny_configs.QUANTIZERS)
def test_training_with_each_quantizer_lowers_the_error(quantizer):
  trainer = _trainer(_objective(_config(quantizer), ema=0.9))
  state, errors = trainer.create_state(), []
  for _ in range(60):
    state, metrics = trainer.step(state, trainer.put({'images': _images()}))
    errors.append(float(metrics['l2']))
  assert np.all(np.isfinite(errors)) and errors[-1] < 0.5 * errors[0]
  assert 'logit_laplace' not in metrics
  # All parts that have parameters are averaged.
  assert state.statistics['average'].keys() == state.params.keys()
  assert ('quantizer' in state.params) == (quantizer not in ('fsq', 'lfq'))


@pytest.mark.parametrize(
  'quantizer, entropy_weight, same',
  [('cosine', 0.5, True), ('euclidean', 0.5, True), ('fsq', 0.5, True)]
  + [('dot', 0.0, True), ('dot', 0.5, False), ('lfq', 0.0, True), ('lfq', 0.5, False)],
)
def test_what_is_over_examples_is_what_microbatches_change(quantizer, entropy_weight, same):
  objective = _objective(_config(quantizer, entropy_weight=entropy_weight))
  params = random_parameters.of_objective(objective)
  loss = lambda images: objective.loss(params, {'images': images}, None, jnp.int32(0))[0]
  images = jnp.asarray(_images())
  whole, *halves = jax.jit(lambda images: [loss(images), loss(images[:2]), loss(images[2:])])(
    images
  )
  assert np.allclose(whole, np.mean(halves), rtol=1e-5) == same
  assert (objective.batch_dependent_terms == ()) == same
  assert dataclasses.replace(objective, quantizer_weight=0.0).batch_dependent_terms == ()


@pytest.mark.parametrize('output', ['pixels', 'logit_laplace'])
def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_convolution(output):
  config = _config(output=output, pixel_range=(-1.0, 2.0))
  plain = _objective(config, quantizer_weight=0.0)
  objective = dataclasses.replace(
    plain, adversarial_weight=0.5, adversarial_adaptive=True, discriminator=JUDGE
  )
  params = random_parameters.of_objective(objective)
  images = jnp.asarray(_images())

  def with_last(kernel):
    last = params['decoder']['conv_out'] | {'kernel': kernel}
    return params | {'decoder': params['decoder'] | {'conv_out': last}}

  def of_adversary(kernel):
    out = vqgan.VQGAN(config).apply({'params': with_last(kernel)}, images / 255.0)
    pixels = out['pixels'] if output == 'pixels' else vit_vqgan.to_pixels(out['mean'])
    return adversarial.losses(JUDGE, params['discriminator'], images / 255.0, pixels)[0]

  rest = jax.grad(
    lambda kernel: plain.loss(with_last(kernel), {'images': images}, None, jnp.int32(1))[0]
  )
  kernel = params['decoder']['conv_out']['kernel']

  @jax.jit
  def found(kernel):
    _, aux = objective.loss(with_last(kernel), {'images': images}, None, jnp.int32(1))
    return rest(kernel), jax.grad(of_adversary)(kernel), aux['metrics']['adversarial_weight']

  *gradients, weight = found(kernel)
  norms = [np.linalg.norm(gradient) for gradient in gradients]
  assert norms[1] > 1e-5
  np.testing.assert_allclose(weight, 0.5 * norms[0] / (norms[1] + 1e-6), rtol=1e-4)


def test_pixels_far_outside_of_the_range_still_have_a_gradient():
  config = _config()
  objective = _objective(config, l2_weight=1.0, quantizer_weight=0.0)
  params = random_parameters.of_objective(objective)
  params['decoder']['conv_out']['bias'] += 100.0
  gradient = jax.jit(
    jax.grad(
      lambda params: objective.loss(params, {'images': jnp.asarray(_images())}, None, jnp.int32(0))[
        0
      ]
    )
  )(params)
  assert np.all(gradient['decoder']['conv_out']['bias'] > 1.0)


@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
def test_codes_are_revived_by_the_distance_of_the_quantizer(distance):
  table = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [7.0, 7.0]])
  # In the direction of a code, but far from it; and near to one, in a direction of its own.
  latents = jnp.asarray([[[1e4, 0.0], [0.02, 0.98]] + [[0.0, 1.0]] * 6])
  latents = latents.at[0, 1].set(jnp.asarray([-0.6, 0.8]) * (1 if distance == 'cosine' else 1e-3))
  dead = jnp.asarray([False, False, True])
  revived, use = revival.revive(
    table, jnp.zeros(3), dead, latents, jax.random.key(0), distance=distance
  )
  np.testing.assert_array_equal(revived[:2], table[:2])
  wanted = {'cosine': [-0.6, 0.8], 'euclidean': [1e4, 0.0]}[distance]
  np.testing.assert_allclose(revived[2], wanted, rtol=1e-5)
  np.testing.assert_allclose(use, [0.0, 0.0, 0.1])


def test_a_euclidean_codebook_begins_with_latents_as_they_are():
  objective = _objective(_config('euclidean'), revive_every=1, revive_until=1)
  draw = np.random.default_rng(0)
  latents = jnp.asarray(draw.normal(size=(8, 16, 4)) * 5, jnp.float32)
  table = jnp.asarray(draw.normal(size=(16, 4)), jnp.float32)
  params, _, _ = objective.after_step(
    {'quantizer': {'codebook': {'table': table}}},
    objective.initial_statistics(),
    {'latents': latents, 'code_use': jnp.ones(16)},
    jnp.int32(0),
    jax.random.key(0),
  )
  found = params['quantizer']['codebook']['table']
  apart = np.abs(found[:, None] - latents.reshape(-1, 4)).max(axis=-1)
  assert apart.min(axis=1).max() == 0.0


@dataclasses.dataclass(frozen=True)
class _Unknown:
  image_size: int = 8


@pytest.mark.parametrize(
  'settings, words',
  [
    *(
      ({'model': _config(name), 'revive_every': 5}, 'revive_every=5: the quantizer of this VQGAN')
      for name in ('dot', 'fsq', 'lfq')
    ),
    ({'model': _config(), 'logit_laplace_weight': 0.1}, 'logit_laplace_weight=0.1: this VQGAN'),
    ({'model': parti_config.PartiConfig()}, 'TokenizerObjective.model: PartiConfig is not the con'),
    ({'model': _Unknown()}, '_Unknown is not the config of an image tokenizer.*--import=MODULE'),
    ({'model': _config(), 'perceptual_weight': 1.0}, 'set it to 0 with VQGANConfig.image_size=8'),
  ],
)
def test_settings_that_do_not_go_with_a_model_are_named(settings, words):
  with pytest.raises(UserError, match=words):
    tokenizer_objective.TokenizerObjective(**{'logit_laplace_weight': 0.0} | settings)


def test_a_checkpoint_names_its_kind_unless_it_is_the_first():
  first = run_checkpoints.describe(tokenizer_objective.TokenizerObjective(tiny_configs.TOKENIZER))
  assert first.keys() == {'stage', 'config'}
  other = run_checkpoints.describe(_objective(_config()))
  assert other['kind'] == 'vqgan'
  for saved, wanted in ((first, other), (other, first)):
    with pytest.raises(UserError, match='run: a tokenizer of the kind v.*, not of v.*'):
      run_checkpoints.check_same_model('run', saved, wanted)
  # Numbers of the loss may change, and tuples become lists in JSON.
  run_checkpoints.check_same_model(
    'run',
    json.loads(json.dumps(other)),
    run_checkpoints.describe(_objective(_config(entropy_weight=0.9, commitment=0.1))),
  )


def _saved(folder, objective):
  trainer = _trainer(objective)
  state = trainer.create_state()
  run = checkpoint_manager.Checkpoints(folder)
  run.save(0, state, {}, run_checkpoints.describe(objective))
  run.close()
  return jax.device_get(state.params)


@pytest.mark.parametrize('quantizer', ['euclidean', 'fsq'])
def test_a_run_is_read_as_what_it_is(quantizer, tmp_path, monkeypatch):
  config = _config(quantizer)
  params = _saved(tmp_path, _objective(config))
  found = frozen_tokenizer.load(tmp_path)
  assert found.config == config and hash(found.config) == hash(config)
  jax.tree.map(np.testing.assert_array_equal, found.params, params)
  # Its fingerprint is of what makes the tokens.
  settings = image_tokenizers.token_settings(config)
  fingerprint = lambda params: fingerprints.of_tokenizer(params, settings)
  assert found.fingerprint == fingerprint(params) != fingerprints.of_tokenizer(params)
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  assert found.fingerprint == fingerprint(params | {'decoder': other['decoder']})
  assert found.fingerprint != fingerprint(params | {'encoder': other['encoder']})
  # The decoder's settings may change in a second phase.
  assert settings == image_tokenizers.token_settings(
    dataclasses.replace(config, decoder_res_blocks=3, remat='nothing')
  )
  tokens = frozen_tokenizer.Encoder(found)(_images())()
  wanted = vqgan.VQGAN(config).apply(
    {'params': params}, jnp.asarray(_images()) / 255.0, method='tokenize'
  )
  np.testing.assert_array_equal(tokens, wanted)
  monkeypatch.setattr(
    run_checkpoints,
    '_kinds',
    lambda name: kinds.Configs(
      'an image tokenizer', 'image_tokenizers', object, {'vit_vqgan': vit_vqgan.ViTVQGANConfig}
    ),
  )
  with pytest.raises(UserError, match="of the kind 'vqgan', which is not one of .*--import=MODULE"):
    frozen_tokenizer.load(tmp_path)


def test_training_goes_on_from_a_folder_with_a_tokenizer_alone(tmp_path):
  objective = _objective(_config('fsq'))
  params = jax.device_get(_trainer(objective).create_state().params)
  model_folder.save_part(
    tmp_path / 'imported', 'tokenizer', model_folder.Part(objective.model, params), {}
  )
  config = _config('fsq', remat='block_inputs')
  second = _trainer(_objective(config, first_phase=str(tmp_path / 'imported')))
  parts = train_loop.initial_parts(second, tmp_path, inputs.Inputs(second.objective, {}, False))
  jax.tree.map(np.testing.assert_array_equal, parts, dict(params))
  vit = tokenizer_objective.TokenizerObjective(
    tiny_configs.TOKENIZER, first_phase=str(tmp_path / 'imported')
  )
  with pytest.raises(UserError, match='first_phase=.*: a tokenizer of the kind vqgan, not of vit'):
    vit.initial_parts({}, inputs.Inputs(vit, {}, False))


def test_plans_take_the_kind_of_a_tokenizer_that_is_not_trained_yet():
  bindings = ['TokenizerObjective.model = @VQGANConfig()']
  gin_config.parse(['gin_configs/models/vqgan_tiny.gin'], bindings)
  found = frozen_tokenizer.sizes('nowhere', lambda: frozen_tokenizer.load('nowhere').config)
  assert type(found) is vqgan.VQGANConfig and found.image_size == 16
  gin_config.parse(['gin_configs/models/vit_vqgan_tiny.gin'], [])
  found = frozen_tokenizer.sizes('nowhere', lambda: frozen_tokenizer.load('nowhere').config)
  assert type(found) is vit_vqgan.ViTVQGANConfig and found.image_size == 16


@pytest.mark.slow
def test_a_run_of_both_phases_through_the_commands(tokenizer_bindings, tmp_path, monkeypatch):
  """Trains, resumes, trains another decoder, exports and tokenizes."""
  one_device = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(mesh_lib, 'make_mesh', one_device)

  def train(name, steps, *bindings):
    fewer = [f'train.steps = {steps}', 'train.log_every = 1', 'train.pictures_every = 0']
    gin_config.parse(
      ['gin_configs/runs/tiny_vqgan_tokenizer.gin'],
      [*tokenizer_bindings[:2], *fewer, *bindings],
    )
    return train_loop.train(str(tmp_path / name))

  def read(name):
    return frozen_tokenizer.load(tmp_path / name)

  train('first', 2)
  train('first', 3)
  assert (tmp_path / 'first' / 'checkpoints' / '3').is_dir()
  phase = [
    f"TokenizerObjective.first_phase = '{tmp_path}/first'",
    "TokenizerObjective.frozen = ('encoder', 'quantizer')",
    'TokenizerObjective.revive_every = 0',
    'VQGANConfig.decoder_res_blocks = 2',
    "VQGANConfig.output = 'logit_laplace'",
    'TokenizerObjective.logit_laplace_weight = 0.1',
  ]
  metrics = train('second', 1, *phase)
  assert np.isfinite(metrics['logit_laplace'])
  first, second = read('first'), read('second')
  assert second.config.decoder_res_blocks == 2 and second.fingerprint == first.fingerprint
  for part in ('encoder', 'quantizer'):
    jax.tree.map(np.testing.assert_array_equal, second.params[part], first.params[part])
  with pytest.raises(UserError, match='first_phase=.*code_dim is 4 there and 8 here'):
    train('other', 2, *phase, 'VQGANConfig.code_dim = 8')

  gin_config.parse(['gin_configs/models/parti_tiny.gin'], [])
  _saved(tmp_path / 'generator', generator_objective.GeneratorObjective(parti_config.PartiConfig()))
  export = ['export', f'--tokenizer={tmp_path}/second', f'--generator={tmp_path}/generator']
  vocabulary = text_to_image.DEMO_FOLDER / 'vocabulary.model'
  export += [f'--vocabulary={vocabulary}', '--dtype=float32', f'--output_dir={tmp_path}/model']
  assert main.main(export) == 0
  exported = model_folder.load_part('tokenizer', tmp_path / 'model')
  assert exported.config == second.config
  jax.tree.map(np.testing.assert_array_equal, exported.params, second.params)
  sources = [f'--gin.{binding}' for binding in tokenizer_bindings[:2]]
  tasks = ['--gin_file=gin_configs/tasks/folder.gin', *sources, '--splits', 'validation']
  caches = []
  for tokenizer in ('first', 'model'):
    output = tmp_path / f'tokens_of_{tokenizer}'
    flags = [f'--tokenizer={tmp_path}/{tokenizer}', f'--output_dir={output}']
    assert main.main(['tokenize', *tasks, *flags]) == 0
    info = token_cache_info.read_info(str(output))
    assert info['tokenizer'] == first.fingerprint and info['codebook_size'] == 64
    caches.append([path.read_bytes() for path in sorted(output.rglob('*.array_record'))])
  assert caches[0] == caches[1] != []
