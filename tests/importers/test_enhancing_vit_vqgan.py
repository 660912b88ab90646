"""enhancing-transformers' ViT-VQGAN against a rewrite in NumPy, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from importers import published

import parti_jax.cli.main as cli
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.importers import enhancing_vit_vqgan as importer
from parti_jax.importers import key_map
from parti_jax.models import enhancing_vit_vqgan

WIDTH, HEADS, LAYERS, MLP, PATCH, SIDE, CODES, CODE_DIM = 128, 2, 2, 24, 4, 3, 20, 6


def _arrays(older=False):
  """Random arrays with the original's names; `older` with those of its earlier versions."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: np.asarray(draw.normal(size=shape) / np.sqrt(shape[-1]), np.float32)
  arrays = {
    'encoder.to_patch_embedding.0.weight': normal(WIDTH, 3, PATCH, PATCH),
    'encoder.to_patch_embedding.0.bias': normal(WIDTH),
    'encoder.en_pos_embedding': 30 * normal(1, SIDE**2, WIDTH),
    'decoder.de_pos_embedding': 5 * normal(1, SIDE**2, WIDTH),
    'pre_quant.weight': normal(CODE_DIM, WIDTH),
    'pre_quant.bias': normal(CODE_DIM),
    'post_quant.weight': normal(WIDTH, CODE_DIM),
    'post_quant.bias': normal(WIDTH),
    'quantizer.embedding.weight': normal(CODES, CODE_DIM),
  }
  output = '1' if older else 'conv_out'
  arrays[f'decoder.to_pixel.{output}.weight'] = normal(WIDTH, 3, PATCH, PATCH)
  arrays[f'decoder.to_pixel.{output}.bias'] = normal(3)
  for side in ('encoder', 'decoder'):
    norm = 'transformer.norm' if older else 'norm'
    arrays[f'{side}.{norm}.weight'], arrays[f'{side}.{norm}.bias'] = (
      1 + normal(WIDTH),
      normal(WIDTH),
    )
    for layer in range(LAYERS):
      start = f'{side}.transformer.layers.{layer}.'
      for place in '01':
        arrays[f'{start}{place}.norm.weight'] = 1 + normal(WIDTH)
        arrays[f'{start}{place}.norm.bias'] = normal(WIDTH)
      arrays[f'{start}0.fn.to_qkv.weight'] = normal(3 * WIDTH, WIDTH)
      arrays[f'{start}0.fn.to_out.weight'] = normal(WIDTH, WIDTH)
      arrays[f'{start}0.fn.to_out.bias'] = normal(WIDTH)
      arrays[f'{start}1.fn.net.0.weight'] = normal(MLP, WIDTH)
      arrays[f'{start}1.fn.net.0.bias'] = normal(MLP)
      arrays[f'{start}1.fn.net.2.weight'] = normal(WIDTH, MLP)
      arrays[f'{start}1.fn.net.2.bias'] = normal(WIDTH)
  return arrays


class _Plain:
  """The original's network for one image, in float64, without any library of networks."""

  def __init__(self, arrays):
    self.arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

  def _norm(self, x, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * self.arrays[f'{name}.weight'] + self.arrays[f'{name}.bias']

  def _linear(self, x, name):
    return x @ self.arrays[f'{name}.weight'].T + self.arrays[f'{name}.bias']

  def _stack(self, x, side, positions):
    x = x + self.arrays[f'{side}.{positions}'][0]
    for layer in range(LAYERS):
      start = f'{side}.transformer.layers.{layer}.'
      qkv = self._norm(x, f'{start}0.norm') @ self.arrays[f'{start}0.fn.to_qkv.weight'].T
      heads = []
      for head in range(HEADS):
        q, k, v = (part[:, 64 * head : 64 * head + 64] for part in np.split(qkv, 3, axis=-1))
        scores = np.exp(q @ k.T / 8)
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
      x = x + self._linear(np.concatenate(heads, axis=-1), f'{start}0.fn.to_out')
      hidden = np.tanh(self._linear(self._norm(x, f'{start}1.norm'), f'{start}1.fn.net.0'))
      x = x + self._linear(hidden, f'{start}1.fn.net.2')
    return self._norm(x, f'{side}.norm')

  def tokens(self, image):
    kernel = self.arrays['encoder.to_patch_embedding.0.weight']
    x = np.stack(
      [
        np.einsum('hwc,dchw->d', image[row : row + PATCH, column : column + PATCH], kernel)
        for row in range(0, SIDE * PATCH, PATCH)
        for column in range(0, SIDE * PATCH, PATCH)
      ]
    )
    x = x + self.arrays['encoder.to_patch_embedding.0.bias']
    latents = self._linear(self._stack(x, 'encoder', 'en_pos_embedding'), 'pre_quant')
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    table = unit(self.arrays['quantizer.embedding.weight'])
    return np.argmin(np.sum((unit(latents)[:, None] - table) ** 2, axis=-1), axis=-1)

  def pixels(self, tokens):
    codes = self.arrays['quantizer.embedding.weight'][tokens]
    codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    x = self._stack(self._linear(codes, 'post_quant'), 'decoder', 'de_pos_embedding')
    patches = np.einsum('nd,dchw->nhwc', x, self.arrays['decoder.to_pixel.conv_out.weight'])
    patches = patches + self.arrays['decoder.to_pixel.conv_out.bias']
    rows = patches.reshape(SIDE, SIDE, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(SIDE * PATCH, SIDE * PATCH, 3)


@pytest.mark.parametrize('older', [False, True])
def test_tokens_and_pixels_are_those_of_the_original(older, tmp_path):
  arrays = _arrays(older) | {'loss.discriminator.weight': np.ones(3, np.float32)}
  safetensors.numpy.save_file(
    {f'state_dict.{name}': array for name, array in arrays.items()}, tmp_path / 'vit.safetensors'
  )
  command = [
    'import',
    'tokenizer',
    str(tmp_path / 'vit.safetensors'),
    f'--format={importer.FORMAT}',
  ]
  assert cli.main([*command, f'--output_dir={tmp_path}/vit']) == 0
  part = model_folder.load_part('tokenizer', tmp_path / 'vit')
  assert part.config.grid == (SIDE, SIDE) and part.config.heads == HEADS
  module = enhancing_vit_vqgan.EnhancingViTVQGAN(part.config)
  variables = {'params': jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), part.params)}
  images = np.random.default_rng(1).random((2, SIDE * PATCH, SIDE * PATCH, 3), np.float32)
  tokens = module.apply(variables, jnp.asarray(images), method='tokenize')
  plain = _Plain(_arrays())
  np.testing.assert_array_equal(tokens, [plain.tokens(image) for image in images])
  assert len(np.unique(tokens)) > 2
  pixels = module.apply(variables, tokens, method='detokenize')
  expected = np.clip([plain.pixels(of_image) for of_image in np.asarray(tokens)], 0, 1)
  np.testing.assert_allclose(pixels, expected, atol=1e-4)
  assert 0 < np.mean((expected > 0) & (expected < 1)) < 1


@pytest.mark.parametrize('size', ['small', 'base'])
def test_the_published_files_are_accepted(size):
  sizes, arrays = published.read(f'enhancing_vit_vqgan_{size}')
  config = importer.config_of(arrays)
  assert {name: getattr(config, name) for name in sizes} == sizes
  assert (config.image_size, config.codebook_size, config.code_dim) == (256, 8192, 32)
  expected = parameter_files.shapes(model_folder.abstract('tokenizer', config))
  key_map.check(importer.key_map(config, arrays), arrays, expected, size, importer.ignored(arrays))


@pytest.mark.parametrize(
  'name, array, message',
  [
    ('encoder.to_patch_embedding.0.weight', None, 'not of the format enhancing-transformers'),
    ('encoder.en_pos_embedding', np.zeros((1, 8, WIDTH), np.float32), '8 tokens'),
    ('quantizer.embedding.weight', None, 'quantizer.embedding.weight is missing'),
    ('encoder.transformer.layers.0.0.fn.to_qkv.weight', np.zeros((9, 3), np.float32), '3 features'),
  ],
)
def test_what_is_not_this_network_is_named(name, array, message):
  arrays = {
    path: published.Listed(found.shape)
    for path, found in (_arrays() | {name: array}).items()
    if found is not None
  }
  with pytest.raises(UserError, match=message):
    importer.config_of(arrays)


@pytest.mark.parametrize(
  'name, shape', [('decoder.to_pixel.1.bias', (1,)), ('decoder.de_pos_embedding', (2, 4, WIDTH))]
)
def test_arrays_of_another_shape_are_named(name, shape):
  arrays = {path: published.Listed(found.shape) for path, found in _arrays(older=True).items()}
  config = importer.config_of(arrays)
  expected = parameter_files.shapes(model_folder.abstract('tokenizer', config))
  check = lambda given: key_map.check(
    importer.key_map(config, given), given, expected, 'a file', importer.ignored(given)
  )
  check(arrays)
  assert name in arrays
  with pytest.raises(UserError, match=f'of another shape: {name}'):
    check(arrays | {name: published.Listed(shape)})
