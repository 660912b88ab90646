"""The tokenizer's perceptual loss with files of weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny_configs

from parti_jax.models import lpips
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import tokenizer_objective


def _arrays():
  """Random weights under the names and with the shapes of both files."""
  draw, trunk, heads, index, channels = np.random.default_rng(0), {}, {}, 0, 3
  for stage, widths in enumerate(lpips.VGG16):
    for width in widths:
      kernel = draw.normal(size=(width, channels, 3, 3), scale=(2 / (9 * channels)) ** 0.5)
      trunk[f'features.{index}.weight'] = kernel.astype(np.float32)
      trunk[f'features.{index}.bias'] = draw.normal(size=width, scale=0.1).astype(np.float32)
      index, channels = index + 2, width
    index += 1
    heads[f'lin{stage}.model.1.weight'] = draw.uniform(size=(1, channels, 1, 1)).astype(np.float32)
  return trunk, heads


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """The folder with both files as .safetensors."""
  folder, (trunk, heads) = tmp_path_factory.mktemp('weights'), _arrays()
  safetensors.numpy.save_file(trunk, folder / 'vgg16.safetensors')
  safetensors.numpy.save_file(heads, folder / 'heads.safetensors')
  return folder


def test_the_tokenizer_learns_by_it_and_does_not_keep_it(files):
  folder = files
  sizes = dataclasses.replace(tiny_configs.TOKENIZER, image_size=16, patch_size=8)
  stage = tokenizer_objective.TokenizerObjective(
    sizes,
    perceptual_weight=0.5,
    vgg16_weights=str(folder / 'vgg16.safetensors'),
    lpips_weights=str(folder / 'heads.safetensors'),
  )
  mesh = mesh_lib.make_mesh(data=2, devices=jax.devices()[:2])
  trainer = trainer_lib.Trainer(stage, optax.sgd(0.1), mesh)
  images = np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  state = trainer.create_state()
  params = jax.device_get(state.params)
  state, metrics = trainer.step(state, trainer.put({'images': images}))
  assert set(state.params) == set(tokenizer_objective.PARTS)
  real = jnp.asarray(images / np.float32(255))

  @jax.jit
  def distances(params, perceptual):
    out = vit_vqgan.ViTVQGAN(sizes).apply({'params': params}, real)
    return lpips.LPIPS().apply({'params': perceptual}, real, vit_vqgan.to_pixels(out['mean']))

  distance = distances(params, jax.device_get(trainer.constants['perceptual']))
  np.testing.assert_allclose(metrics['perceptual'], np.mean(distance), rtol=1e-4)
  np.testing.assert_allclose(
    metrics['loss'],
    metrics['l2']
    + 0.1 * metrics['logit_laplace']
    + metrics['quantizer_loss']
    + 0.5 * metrics['perceptual'],
    rtol=1e-5,
  )
  # A plan knows their shapes without the files.
  assert jax.tree.map(lambda leaf: leaf.shape, trainer.constants) == jax.tree.map(
    lambda leaf: leaf.shape, stage.abstract_constants()
  )
