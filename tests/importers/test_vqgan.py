"""Tests of parti_jax.importers.vqgan.

`manifests/` has the names and shapes of published weights, as the original code makes them. Outputs
are compared with other libraries in tests/references/test_vqgan.py.
"""

import dataclasses
import json
import pathlib
import re

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import vqgan as importer
from parti_jax.models import vqgan

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
TAMING = vqgan.VQGANConfig(
  code_dim=256, codebook_size=16384, quantizer='euclidean', output='pixels', dtype='float32'
)
_changed = lambda **changes: dataclasses.replace(TAMING, **changes)
PUBLISHED = {
  'taming_f16_16384': ('taming', TAMING),
  'dalle_mini_vqgan_16384': ('dalle-mini', _changed(pixel_range=(0, 1))),
  'llamagen_vq_16': ('llamagen', _changed(quantizer='cosine', code_dim=8)),
  'llamagen_vq_8': (
    'llamagen',
    _changed(quantizer='cosine', code_dim=8, multipliers=(1, 2, 2, 4)),
  ),
  'ibq_16384': ('ibq', _changed(quantizer='dot', res_blocks=4, decoder_res_blocks=5)),
  'maskgit_1024': (
    'maskgit',
    _changed(
      codebook_size=1024,
      decoder_res_blocks=2,
      z_channels=None,
      attention=False,
      middle_attention=False,
      pixel_range=(0, 1),
      downsampling='average',
      bias=False,
      shortcut='output',
    ),
  ),
}
# Further sizes of the codebook that are published, and the arrays that hold it.
OTHER_CODEBOOKS = [
  ('taming_f16_16384', 1024, ['quantize.embedding.weight']),
  *(
    ('ibq_16384', codes, ['quantize.embedding.weight', 'model_ema.quantizeembeddingweight'])
    for codes in (1024, 8192, 262144)
  ),
]


@dataclasses.dataclass
class _Stored:
  """An array that is not there, but for its shape."""

  shape: tuple[int, ...]
  dtype = np.dtype(np.float32)


def _manifest(name):
  shapes = json.loads((MANIFESTS / f'{name}.json').read_text())
  return {name: _Stored(tuple(shape)) for name, shape in shapes.items()}


def _check(arrays, file_format, config):
  key_map.check(
    importer.key_map(config, arrays, file_format),
    arrays,
    importer.expected(config),
    'a file',
    importer.ignored(arrays, file_format),
  )


def _prefixed(prefix, arrays):
  return {f'{prefix}{name}': array for name, array in arrays.items()}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_weights_fit_the_network(name):
  file_format, config = PUBLISHED[name]
  arrays = _manifest(name)
  assert importer.config_of(arrays, file_format) == config
  _check(arrays, file_format, config)


@pytest.mark.parametrize('name, codes, tables', OTHER_CODEBOOKS)
def test_published_weights_with_other_codebooks_fit_too(name, codes, tables):
  file_format, config = PUBLISHED[name]
  arrays = _manifest(name) | {table: _Stored((codes, 256)) for table in tables}
  found = importer.config_of(arrays, file_format)
  assert found == dataclasses.replace(config, codebook_size=codes)
  _check(arrays, file_format, found)


def test_the_image_size_and_the_pixel_range_can_be_given():
  arrays = _manifest('maskgit_1024')
  found = importer.config_of(arrays, 'maskgit', image_size=512, pixel_range=(-1, 1))
  assert (found.image_size, found.grid, found.pixel_range) == (512, (32, 32), (-1, 1))


@pytest.mark.parametrize('name', PUBLISHED)
@pytest.mark.parametrize('file_format', importer.FORMATS)
def test_weights_of_another_format_are_refused(name, file_format):
  right, _ = PUBLISHED[name]
  if file_format == right or {file_format, right} == {'taming', 'ibq'}:
    return  # These two have the same names.
  with pytest.raises(UserError, match=f'not of the format {file_format}.*may be of .*{right}'):
    importer.config_of(_manifest(name), file_format)


def test_an_unknown_format_and_unknown_weights_are_refused():
  with pytest.raises(UserError, match="format='magvit' is not one of taming, dalle-mini"):
    importer.config_of(_manifest('taming_f16_16384'), 'magvit')
  with pytest.raises(
    UserError, match=r'not of the format ibq: there is no encoder\.down'
  ) as raised:
    importer.config_of({'weight': _Stored((2, 2))}, 'ibq')
  assert 'may be' not in str(raised.value)


def test_a_codebook_with_three_axes_is_refused():
  arrays = _manifest('maskgit_1024')
  (name,) = (name for name in arrays if name.endswith('quantizer/codebook'))
  arrays |= {name: _Stored((1, 1024, 256))}
  with pytest.raises(UserError, match='maskgit lack an array, or it has another shape'):
    importer.config_of(arrays, 'maskgit')


def test_averaged_weights_are_preferred():
  arrays = _manifest('ibq_16384')
  config = importer.config_of(arrays, 'ibq')
  names = {
    name for source in importer.key_map(config, arrays, 'ibq').values() for name in source[0]
  }
  assert names and all(name.startswith('model_ema.') for name in names)
  # Their plain copies are not read as weights of taming, which would find other codes.
  with pytest.raises(UserError, match=r'not part of this network: model_ema\.'):
    _check(arrays, 'taming', dataclasses.replace(config, quantizer='euclidean'))
  plain = {name: array for name, array in arrays.items() if not name.startswith('model_ema.')}
  assert importer.config_of(plain, 'ibq') == config
  _check(plain, 'ibq', config)


@pytest.mark.parametrize(
  'others, chosen',
  [
    ([], 'model.'),
    (['ema.'], 'ema.'),
    (['optimizer.'], 'model.'),
  ],
)
def test_a_file_of_a_training_run_may_hold_the_network_several_times(others, chosen):
  arrays = _manifest('llamagen_vq_8')
  bare = {name.removeprefix('model.'): array for name, array in arrays.items()}
  for prefix in others:
    arrays |= _prefixed(prefix, bare)
  arrays['optimizer.state.0.exp_avg'] = _Stored((3,))
  config = importer.config_of(arrays, 'llamagen')
  sources = importer.key_map(config, arrays, 'llamagen')
  assert sources['encoder/conv_in/bias'].names == (f'{chosen}encoder.conv_in.bias',)
  _check(arrays, 'llamagen', config)


def test_a_tokenizer_within_a_larger_model_is_found():
  arrays = {
    name.replace('model.', 'gen_vision_model.', 1): array
    for name, array in _manifest('llamagen_vq_16').items()
  }
  arrays['language_model.embed_tokens.weight'] = _Stored((7, 3))
  config = importer.config_of(arrays, 'llamagen')
  _check(arrays, 'llamagen', config)
  with pytest.raises(UserError, match=r"2 times, under 'gen_vision_model\.', 'teacher\.'"):
    importer.config_of(
      arrays
      | {name.replace('gen_vision_model.', 'teacher.'): array for name, array in arrays.items()},
      'llamagen',
    )


def test_losses_and_nothing_else_may_be_left_over():
  arrays = _prefixed('state_dict.', _manifest('taming_f16_16384'))
  arrays['state_dict.loss.discriminator.main.0.weight'] = _Stored((64, 3, 4, 4))
  arrays['optimizer_states.0.state.0.exp_avg'] = _Stored((3,))
  config = importer.config_of(arrays, 'taming')
  _check(arrays, 'taming', config)
  more = 'state_dict.encoder.down.3.attn.0.q.weight'
  arrays[more] = _Stored((256, 256, 1, 1))
  with pytest.raises(UserError, match=f'not part of this network: {re.escape(more)}'):
    _check(arrays, 'taming', config)


@pytest.mark.parametrize('name', PUBLISHED)
def test_an_array_that_is_missing_or_of_another_shape_is_named(name):
  file_format, config = PUBLISHED[name]
  arrays = _manifest(name)
  used = sorted(
    {
      name
      for source in importer.key_map(config, arrays, file_format).values()
      for name in source[0]
    }
  )
  for chosen in used[:: len(used) // 3]:
    others = {name: array for name, array in arrays.items() if name != chosen}
    with pytest.raises(UserError):
      _check(others, file_format, importer.config_of(others, file_format))
    wrong = arrays | {chosen: _Stored((*arrays[chosen].shape, 2))}
    with pytest.raises(UserError):
      _check(wrong, file_format, importer.config_of(wrong, file_format))


# MaskGIT-VQGAN, from its description: Flax names the modules of one class by their order.


class ResBlock(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x):
    y = x
    for _ in range(2):
      y = nn.swish(nn.GroupNorm()(y))
      y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
    if x.shape[-1] == self.features:
      return x + y
    return y + nn.Conv(self.features, (1, 1), use_bias=False)(y)


class Coder(nn.Module):
  """The encoder or the decoder: their levels in the order of use."""

  levels: tuple[int, ...]
  blocks: int
  outputs: int
  up: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.levels[0], (3, 3), use_bias=self.up)(x)
    levels = [self.levels[0], *self.levels] if self.up else [*self.levels, self.levels[-1]]
    resized = range(1, len(self.levels)) if self.up else range(len(self.levels) - 1)
    for place, features in enumerate(levels):
      for _ in range(self.blocks):
        x = ResBlock(features)(x)
      if place in resized and self.up:
        x = nn.Conv(features, (3, 3))(x.repeat(2, axis=1).repeat(2, axis=2))
      elif place in resized:
        x = (x[:, ::2] + x[:, 1::2]) / 2
        x = (x[:, :, ::2] + x[:, :, 1::2]) / 2
    side = 3 if self.up else 1
    return nn.Conv(self.outputs, (side, side))(nn.swish(nn.GroupNorm()(x)))


def test_maskgits_tokenizer_gives_the_same_tokens_and_pixels(tmp_path):
  draw = np.random.default_rng(0)
  encoder = Coder((32, 64, 64), 1, 5, up=False)
  decoder = Coder((64, 64, 32), 1, 3, up=True)
  images = jnp.asarray(draw.uniform(size=(2, 24, 16, 3)), jnp.float32)
  table = jnp.asarray(draw.normal(size=(19, 5)), jnp.float32)
  noise = lambda leaf: leaf + 0.1 * draw.normal(size=leaf.shape).astype(np.float32)
  parts = {
    'encoder': jax.tree.map(noise, random_parameters.of(encoder, [images])),
    'decoder': jax.tree.map(noise, random_parameters.of(decoder, [jnp.zeros((1, 6, 4, 5))], 1)),
    'quantizer': {'codebook': table},
  }
  latents = jax.jit(encoder.apply)({'params': parts['encoder']}, images)
  tokens = np.argmin(np.sum(np.square(latents[..., None, :] - table), axis=-1), axis=-1)
  pixels = jax.jit(decoder.apply)({'params': parts['decoder']}, table[tokens])

  read = []
  for tree in (parts, {'params': parts}):
    file = tmp_path / 'tokenizer_checkpoint'
    file.write_bytes(flax.serialization.msgpack_serialize(tree))
    arrays = files.open_weights([str(file)]).arrays
    config = importer.config_of(arrays, 'maskgit', image_size=16)
    _check(arrays, 'maskgit', config)
    sources = importer.key_map(config, arrays, 'maskgit')
    read.append(jax.tree.map(np.asarray, key_map.convert(sources, arrays)))
  jax.tree.map(np.testing.assert_array_equal, *read)
  params = {'params': flax.traverse_util.unflatten_dict(read[0], sep='/')}
  apply = jax.jit(vqgan.VQGAN(config).apply, static_argnames=('method', 'grid'))
  out = apply(params, images)
  np.testing.assert_allclose(out['latents'], latents.reshape(2, 24, 5), atol=1e-4)
  np.testing.assert_array_equal(out['tokens'], tokens.reshape(2, 24))
  assert len(np.unique(tokens)) > 5
  found = apply(params, out['tokens'], grid=(6, 4), method='detokenize')
  np.testing.assert_allclose(found, np.clip(pixels, 0, 1), atol=1e-4)
