"""Super-resolution's objective: what its inputs are, its loss, and a run from tokenizer to export."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs
from PIL import Image

from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.importers import lpips_files
from parti_jax.models import discriminator as discriminator_lib
from parti_jax.models import flops
from parti_jax.models import lpips
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.sampling import text_to_image
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import super_resolution_objective

TOKENIZER = tiny_configs.TOKENIZER
NETWORK = super_resolution.SuperResolutionConfig(
  factor=2, blocks=1, width=4, expansion=2, dtype='float32'
)


@pytest.fixture(scope='module')
def tokenizer_params():
  module = vit_vqgan.ViTVQGAN(TOKENIZER)
  return random_parameters.of(module, vit_vqgan.example_inputs(TOKENIZER))


@pytest.fixture
def make_objective(monkeypatch, tokenizer_params):
  monkeypatch.setattr(
    frozen_tokenizer,
    'load',
    lambda path: frozen_tokenizer.FrozenTokenizer(path, TOKENIZER, tokenizer_params),
  )
  return lambda **more: super_resolution_objective.SuperResolutionObjective(
    NETWORK, image_size=16, **more
  )


@pytest.fixture(scope='module')
def params():
  """Parameters whose last convolution is no longer zero."""
  objective = super_resolution_objective.SuperResolutionObjective(NETWORK, image_size=16)
  params = random_parameters.of_objective(objective)
  tail = params['tail']
  return params | {'tail': tail | {'gain': jnp.full_like(tail['gain'], 0.3)}}


def batch(count):
  images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
  return {'images': images}


def averaged(images):
  return images.reshape(-1, 8, 2, 8, 2, 3).mean((2, 4), dtype=np.float32) / 255


@jax.jit
def through_tokens(tokenizer_params, images):
  module = vit_vqgan.ViTVQGAN(TOKENIZER)
  tokens = module.apply({'params': tokenizer_params}, images, method='tokenize')
  return module.apply({'params': tokenizer_params}, tokens, method='detokenize')


def reconstructed(tokenizer_params, images):
  pixels = through_tokens(tokenizer_params, jnp.asarray(images))
  return np.round(np.asarray(pixels) * 255) / 255


apply_network = jax.jit(super_resolution.SuperResolution(NETWORK).apply)


def errors(params, inputs, targets):
  """Differences of the network's pictures to what they should be."""
  outputs = apply_network({'params': params}, jnp.asarray(inputs))
  return np.asarray(outputs) - targets / np.float32(255)


def loss_of(objective, params, batch):
  keys = layers.dropout_keys(jax.random.key(1), len(batch['images']))
  return jax.jit(objective.loss)(objective_params(objective, params), batch, keys, 0)


def objective_params(objective, params):
  return params | objective.constants()


def test_the_loss_is_that_of_enlarged_reconstructions(make_objective, params, tokenizer_params):
  pictures = batch(4)
  objective = make_objective(tokenizer='runs/tokenizer', l2_weight=2.0, l1_weight=0.5)
  inputs = reconstructed(tokenizer_params, averaged(pictures['images']))
  error = errors(params, inputs, pictures['images'])
  loss, aux = loss_of(objective, params, pictures)
  assert loss == pytest.approx(2 * np.mean(error**2) + 0.5 * np.mean(np.abs(error)), rel=1e-4)
  assert set(aux['metrics']) == {'l2', 'l1', 'psnr', 'loss'}
  clean, _ = loss_of(make_objective(l2_weight=2.0, l1_weight=0.5), params, pictures)
  error = errors(params, averaged(pictures['images']), pictures['images'])
  assert clean == pytest.approx(2 * np.mean(error**2) + 0.5 * np.mean(np.abs(error)), rel=1e-4)


def test_a_share_of_the_inputs_is_clean(make_objective, params, tokenizer_params):
  pictures = batch(64)
  clean = averaged(pictures['images'])
  squares = [
    np.mean(errors(params, inputs, pictures['images']) ** 2, axis=(1, 2, 3))
    for inputs in (reconstructed(tokenizer_params, clean), clean)
  ]
  objective = make_objective(tokenizer='runs/tokenizer', clean_share=0.25)
  loss = jax.jit(objective.loss)
  seen = []
  for row in range(12):  # What an example gets follows from its place in the whole batch.
    one = {'images': pictures['images'][row : row + 1]}
    keys = layers.DropoutKeys(jax.random.key(1), jnp.array([row], jnp.uint32))
    value, _ = loss(objective_params(objective, params), one, keys, 0)
    seen.append(int(np.argmin([abs(value - square[row]) for square in squares])))
    assert value == pytest.approx(squares[seen[-1]][row], rel=1e-4)
  assert set(seen) == {0, 1}
  whole, _ = loss_of(objective, params, pictures)
  # Of 64 about 16 are clean.
  share = (whole - squares[0].mean()) / (squares[1].mean() - squares[0].mean())
  assert 0.05 < share < 0.5


def test_crops_are_places_of_the_picture(make_objective, params):
  objective = make_objective(crop=4)
  pictures = batch(1)
  expected = set()
  for row in range(5):
    for column in range(5):
      small = averaged(pictures['images'])[:, row : row + 4, column : column + 4]
      large = pictures['images'][:, 2 * row : 2 * row + 8, 2 * column : 2 * column + 8]
      expected.add(round(float(np.mean(errors(params, small, large) ** 2)), 5))
  loss = jax.jit(objective.loss)
  keys = (layers.dropout_keys(jax.random.key(key), 1) for key in range(12))
  found = {round(float(loss(params, pictures, key, 0)[0]), 5) for key in keys}
  assert len(found) > 4
  assert all(min(abs(loss - other) for other in expected) < 2e-5 for loss in found)


def test_evaluation_is_beside_bicubic_enlargement(make_objective, params, tokenizer_params):
  pictures = batch(2)
  objective = make_objective(tokenizer='runs/tokenizer')
  measures = jax.jit(objective.evaluate)(objective_params(objective, params), pictures)
  clean = averaged(pictures['images'])
  for name, inputs in (('', reconstructed(tokenizer_params, clean)), ('clean_', clean)):
    bytes_ = np.round(inputs * 255).astype(np.uint8)
    enlarged = [
      Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC) for image in bytes_
    ]
    error = np.stack([np.asarray(image) for image in enlarged]) / 255 - pictures['images'] / 255
    psnr = -10 * np.log10(np.mean(error**2, axis=(1, 2, 3)))
    np.testing.assert_allclose(measures[f'{name}bicubic_psnr'], psnr, atol=0.05)
    outputs = errors(params, inputs, pictures['images']) + pictures['images'] / 255
    error = np.clip(outputs, 0, 1) - pictures['images'] / 255
    np.testing.assert_allclose(
      measures[f'{name}psnr'], -10 * np.log10(np.mean(error**2, axis=(1, 2, 3))), atol=1e-3
    )
  assert set(jax.eval_shape(make_objective().evaluate, params, pictures)) == {
    'clean_psnr',
    'clean_bicubic_psnr',
  }


def test_perceptual_and_adversarial_losses_are_added(make_objective, monkeypatch):
  discriminator = discriminator_lib.DiscriminatorConfig(channels=32, minibatch_group=1)
  plain = make_objective()
  objective = make_objective(
    perceptual_weight=0.5,
    vgg16_weights='vgg16.pth',
    lpips_weights='vgg.pth',
    adversarial_weight=0.3,
    adversarial_from=2,
    r1_every=2,
    r1_weight=4.0,
    discriminator=discriminator,
  )
  weights = random_parameters.of(lpips.LPIPS(), lpips.example_inputs(), seed=5)
  monkeypatch.setattr(lpips_files, 'read', lambda vgg16, heads: weights)
  params = nn.meta.unbox(jax.jit(objective.init)(jax.random.key(0)))
  pictures = batch(2)
  keys = layers.dropout_keys(jax.random.key(1), 2)
  loss = jax.jit(objective.loss)
  # Before training the network's pictures are bicubic enlargements.
  drawn = super_resolution.enlarge(jnp.asarray(averaged(pictures['images'])), 2)
  large = jnp.asarray(pictures['images'] / np.float32(255))
  without = {name: part for name, part in params.items() if name != 'discriminator'}
  plain_loss, _ = jax.jit(plain.loss)(without, pictures, keys, 0)
  seen = 0.5 * np.mean(jax.jit(lpips.LPIPS().apply)({'params': weights}, large, drawn))
  early, aux = loss(params | objective.constants(), pictures, keys, 0)
  assert early == pytest.approx(float(plain_loss + seen), rel=1e-4)
  assert aux['metrics']['loss'] == early
  of_network, of_discriminator, _ = jax.jit(functools.partial(adversarial.losses, discriminator))(
    params['discriminator'], large, drawn
  )
  penalty = jax.jit(functools.partial(adversarial.r1_penalty, discriminator))(
    params['discriminator'], large
  )
  for step, times in ((2, 1), (3, 0)):
    late, aux = loss(params | objective.constants(), pictures, keys, step)
    of_objective = float(early + 0.3 * of_network)
    beside = float(of_discriminator + times * 0.5 * 4.0 * 2 * penalty)
    assert aux['metrics']['loss'] == pytest.approx(of_objective, rel=1e-4)
    assert late == pytest.approx(of_objective + beside, rel=1e-4)
  assert set(objective.other_optimizers()) == {'discriminator'} and not plain.other_optimizers()


@pytest.mark.parametrize(
  'bad, message',
  [
    ({'image_size': 15}, 'image_size=15 is not divisible by 2'),
    ({'clean_share': 2}, 'clean_share=2'),
    ({'crop': 9}, 'crop=9'),
    ({'r1_every': 0}, 'r1_every=0'),
    ({'adversarial_weight': 0.1, 'crop': 5}, 'power of two.*SuperResolutionObjective.crop'),
  ],
)
def test_what_can_not_be_is_named(bad, message):
  with pytest.raises(UserError, match=message):
    super_resolution_objective.SuperResolutionObjective(NETWORK, **{'image_size': 16} | bad)


def test_a_tokenizer_of_another_size_is_named(make_objective):
  objective = dataclasses.replace(make_objective(tokenizer='runs/tokenizer'), image_size=32)
  with pytest.raises(UserError, match='image_size=32 is not .*factor=2 times the 8 pixels'):
    objective.constants()


def test_a_missing_tokenizer_is_named_and_not_planned_with(tmp_path):
  objective = super_resolution_objective.SuperResolutionObjective(
    NETWORK, image_size=16, tokenizer=str(tmp_path / 'run')
  )
  with pytest.raises(
    UserError, match=r"SuperResolutionObjective.tokenizer='.*/run': .*no training"
  ):
    objective.constants()


def test_a_plan_needs_no_trained_tokenizer(make_objective, tokenizer_params, monkeypatch, tmp_path):
  objective = make_objective(tokenizer='runs/tokenizer')
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(objective.abstract_constants()) == shapes({'tokenizer': tokenizer_params})
  monkeypatch.undo()
  gin_config.parse(
    [],
    [f'ViTVQGANConfig.{name} = {value!r}' for name, value in dataclasses.asdict(TOKENIZER).items()],
  )
  untrained = dataclasses.replace(objective, tokenizer=str(tmp_path / 'nowhere'))
  assert shapes(untrained.abstract_constants()) == shapes({'tokenizer': tokenizer_params})
  with pytest.raises(UserError, match='nowhere: no training run there'):
    untrained.constants()


def test_model_flops_count_what_judges_the_pictures():
  objective = lambda **more: super_resolution_objective.SuperResolutionObjective(
    NETWORK, image_size=64, crop=16, **more
  )
  judge = discriminator_lib.DiscriminatorConfig(channels=64, max_channels=8)
  plain = objective().step_flops(4)
  # Of 32×32 pixels, the crop enlarged; see tokenizer_objective for the passes.
  assert objective(perceptual_weight=0.1).step_flops(4) - plain == 4 * 3 * flops.vgg16_forward(32)
  adversarial = objective(adversarial_weight=0.1, discriminator=judge).step_flops(4)
  assert adversarial - plain == 4 * 7 * flops.discriminator_forward(judge, 32)


def test_from_a_tokenizer_to_an_exported_part(tokenizer_bindings, tmp_path, capsys):
  data = [f'--gin.{binding}' for binding in tokenizer_bindings]
  assert (
    main.main(
      [
        'train',
        '--gin_file=gin_configs/runs/tiny_tokenizer.gin',
        *data,
        '--gin.train.steps=1',
        f'--model_dir={tmp_path}/tokenizer',
      ]
    )
    == 0
  )
  capsys.readouterr()
  assert (
    main.main(
      [
        'train',
        '--gin_file=gin_configs/runs/super_resolution_x2.gin',
        '--gin_file=gin_configs/tasks/folder.gin',
        *data,
        '--gin.train.steps=2',
        '--gin.train.batch_size=8',
        f"--gin.SuperResolutionObjective.tokenizer='{tmp_path}/tokenizer'",
        '--gin.SuperResolutionObjective.image_size=32',
        '--gin.SuperResolutionObjective.crop=8',
        '--gin.SuperResolutionConfig.blocks=1',
        '--gin.SuperResolutionConfig.width=4',
        f'--model_dir={tmp_path}/run',
      ]
    )
    == 0
  )
  printed = capsys.readouterr()
  found = dict(re.findall(r'validation/(\w+) ([\d.]+)', printed.out + printed.err))
  assert set(found) == {'psnr', 'bicubic_psnr', 'clean_psnr', 'clean_bicubic_psnr'}
  assert (
    main.main(
      [
        'export',
        f'--base={text_to_image.DEMO_FOLDER}',
        f'--output_dir={tmp_path}/model',
        f'--super_resolution={tmp_path}/run',
      ]
    )
    == 2
  )
  assert (
    'the super-resolution network ' in (error := capsys.readouterr().err)
    and 'was made with the tokenizer' in error
  )
  assert (
    main.main(
      [
        'export',
        f'--base={text_to_image.DEMO_FOLDER}',
        f'--output_dir={tmp_path}/model',
        f'--super_resolution={tmp_path}/run',
        '--allow_mismatch',
      ]
    )
    == 0
  )
  model = model_folder.load(tmp_path / 'model')
  assert model.parts['super_resolution'].config.blocks == 1
  assert model.provenance['super_resolution_steps'] == 2
