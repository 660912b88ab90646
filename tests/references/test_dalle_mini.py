"""parti_jax.models.dalle_mini and its importer against min-dalle, with random weights."""

import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_dalle_mini

torch = pytest.importorskip('torch')
min_dalle_models = pytest.importorskip('min_dalle.models')

from parti_jax.exported_model import parameter_files  # noqa: E402
from parti_jax.exported_model import sampling_settings  # noqa: E402
from parti_jax.importers import dalle_mini as importer  # noqa: E402
from parti_jax.importers import files  # noqa: E402
from parti_jax.importers import key_map  # noqa: E402
from parti_jax.importers import min_dalle as min_dalle_files  # noqa: E402
from parti_jax.models import dalle_mini  # noqa: E402
from parti_jax.sampling import decoding  # noqa: E402
from parti_jax.sampling import parameters  # noqa: E402

# min-dalle's code has 256 image tokens.
GRID, LENGTH = (16, 16), 256
SETTINGS = tiny_dalle_mini.SETTINGS | {
  'image_length': LENGTH,
  'encoder_ffn_dim': 27,
  'decoder_ffn_dim': 27,
  'encoder_vocab_size': 301,
}
CODES = tiny_dalle_mini.CODES
ROWS = SETTINGS['image_vocab_size'] + 1
PADDING = 1

# min-dalle's names -> those of the Flax files.
_NAMES = (
  (r'\.self_attn\.(\w+)\.weight', r'.FlaxBartAttention_0.\1.kernel'),
  (r'\.encoder_attn\.(\w+)\.weight', r'.FlaxBartAttention_1.\1.kernel'),
  (r'\.pre_self_attn_layer_norm', '.LayerNorm_0'),
  (r'\.self_attn_layer_norm', '.LayerNorm_1'),
  (r'\.pre_encoder_attn_layer_norm', '.LayerNorm_2'),
  (r'\.encoder_attn_layer_norm', '.LayerNorm_3'),
  (r'\.glu\.ln(\d)', r'.GLU_0.LayerNorm_\1'),
  (r'\.glu\.fc(\d)\.weight', r'.GLU_0.Dense_\1.kernel'),
  (r'^(embed_\w+)\.weight', r'\1.embedding'),
  (r'^lm_head\.weight', 'lm_head.kernel'),
  (r'weight$', 'scale'),
)


def _fill(module, tower, arrays):
  """Gives a module of min-dalle the values of the Flax arrays; scales that are missing are ones."""
  left = {name for name in arrays if name.startswith((f'model/{tower}', 'lm_head'))}
  for name, parameter in module.named_parameters():
    theirs = re.sub(r'^layers\.\d+', 'layers', name)
    for pattern, replacement in _NAMES:
      theirs = re.sub(pattern, replacement, theirs)
    start = '' if theirs.startswith('lm_head') else f'model/{tower}/'
    stack = f'layers/FlaxBart{tower.capitalize()}Layers'
    theirs = start + theirs.replace('.', '/').replace('layers', stack)
    layer = re.match(r'layers\.(\d+)', name)
    if theirs not in arrays:
      assert theirs.endswith('scale'), theirs
      value = np.ones(parameter.shape, np.float32)
    else:
      left.discard(theirs)
      value = arrays[theirs][int(layer[1])] if layer else arrays[theirs]
      value = value.T if theirs.endswith('kernel') else value
    with torch.no_grad():
      parameter.copy_(torch.tensor(np.ascontiguousarray(value)))
  assert not left - ({'lm_head/kernel'} if tower == 'encoder' else set())
  return module.eval()


@pytest.fixture(scope='module', name='theirs')
def fixture_theirs():
  arrays = tiny_dalle_mini.arrays(SETTINGS)
  sizes = {
    'embed_count': SETTINGS['d_model'],
    'attention_head_count': SETTINGS['encoder_attention_heads'],
    'glu_embed_count': SETTINGS['encoder_ffn_dim'],
    'layer_count': SETTINGS['encoder_layers'],
    'device': 'cpu',
  }
  encoder = min_dalle_models.DalleBartEncoder(
    text_vocab_count=SETTINGS['encoder_vocab_size'],
    text_token_count=SETTINGS['max_text_length'],
    **sizes,
  )
  decoder = min_dalle_models.DalleBartDecoder(image_vocab_count=ROWS - 1, **sizes)
  return _fill(encoder, 'encoder', arrays), _fill(decoder, 'decoder', arrays)


@functools.cache
def _ours(folder, start):
  """Our config and parameters, read from files, with a row as the first input."""
  settings = SETTINGS | {'decoder_start_token_id': start}
  tiny_dalle_mini.write(folder, settings)
  weights = files.open_weights([str(folder / 'flax_model.msgpack')])
  config = importer.config_of(weights.arrays, settings, CODES, GRID)
  begin = importer.first_input(weights.arrays, settings, config)
  found = importer.key_map(config, weights.arrays, begin)
  abstract = jax.eval_shape(
    dalle_mini.DalleMini(config).init, jax.random.key(0), *dalle_mini.example_inputs(config)
  )
  key_map.check(found, weights.arrays, parameter_files.shapes(abstract['params']), 'the file')
  params = jax.tree.map(np.asarray, key_map.convert(found, weights.arrays))
  return config, flax.traverse_util.unflatten_dict(params, sep='/')


@pytest.fixture(scope='module', name='folder')
def fixture_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('dalle_mini')


def test_files_of_min_dalle_hold_the_same_arrays(theirs, tmp_path):
  paths = [str(tmp_path / name) for name in ('encoder.pt', 'decoder.pt')]
  for path, module in zip(paths, theirs):
    torch.save(module.state_dict(), path)
  found = min_dalle_files.open_weights(paths).arrays
  expected = tiny_dalle_mini.arrays(SETTINGS)
  assert set(found) == set(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name].read(), array)


def _texts(seed=0):
  """Pairs of texts of several lengths, padded as ours and as theirs; the first one is full."""
  draw, length = np.random.default_rng(seed), SETTINGS['max_text_length']
  ours, theirs = np.zeros((4, length), np.int32), np.full((4, length), PADDING, np.int32)
  for row, used in enumerate((length, 2, 5, 3)):
    tokens = [0, *draw.integers(3, SETTINGS['encoder_vocab_size'], used - 2), 2]
    ours[row, :used] = theirs[row, :used] = tokens
  return ours, theirs


def _encoded(encoder, texts):
  """min-dalle's encoder takes two texts."""
  pairs = torch.tensor(texts, dtype=torch.long).split(2)
  with torch.no_grad():
    return torch.cat([encoder(pair) for pair in pairs])


def test_encoded_texts_are_those_of_min_dalle(theirs, folder):
  config, params = _ours(folder, CODES)
  ours, padded = _texts()
  expected = _encoded(theirs[0], padded).numpy()
  module = dalle_mini.TextEncoder(config)
  found = jax.jit(lambda texts: module.apply({'params': params['text_encoder']}, texts))(ours)
  # Nothing sees the outputs at padding, where the ids differ.
  seen = padded != PADDING
  np.testing.assert_allclose(np.asarray(found)[seen], expected[seen], atol=1e-4)


# min-dalle in torch begins with the row of the last code, config.json names the row after it, and
# min-dalle in Flax takes mega's last row.
@pytest.mark.parametrize('start', [CODES - 1, CODES, ROWS - 1])
def test_logits_are_those_of_min_dalle(theirs, folder, start):
  config, params = _ours(folder, start)
  ours, padded = _texts()
  images = np.random.default_rng(1).integers(CODES, size=(4, LENGTH)).astype(np.int32)
  images[2:] = images[:2]  # min-dalle decodes each image with two texts.
  module = dalle_mini.DalleMini(config)
  found = jax.jit(lambda *inputs: module.apply({'params': params}, *inputs))(ours, images)
  previous = np.concatenate([np.full((2, 1), start), images[:2, :-1]], axis=1)
  with torch.no_grad():
    expected, _ = theirs[1](
      attention_mask=torch.tensor(padded != PADDING)[:, None, None],
      encoder_state=_encoded(theirs[0], padded),
      attention_state=torch.zeros(config.decoder_layers, 8, LENGTH, config.width),
      prev_tokens=torch.tensor(previous),
      token_index=torch.arange(LENGTH),
    )
  np.testing.assert_allclose(found, expected.numpy()[..., :CODES], atol=1e-4)


def _greedy(encoder, decoder, texts, start, scale):
  """min-dalle's images of each text with guidance, one position at a time with its cache.

  Its own `sample_tokens` draws at random among at least 2**14 codes.
  """
  empty = np.full_like(texts, PADDING)
  empty[:, :2] = 0, 2
  count = len(texts)
  both = np.concatenate([empty, texts])
  encoded = _encoded(encoder, both)
  state = torch.zeros(len(decoder.layers), 4 * count, LENGTH, encoded.shape[-1])
  images = torch.full((count, LENGTH + 1), start)
  for position in range(LENGTH):
    with torch.no_grad():
      logits, state = decoder(
        attention_mask=torch.tensor(both != PADDING)[:, None, None],
        encoder_state=encoded,
        attention_state=state,
        prev_tokens=images[:, [position]],
        token_index=torch.tensor([position]),
      )
    without, given = logits[:, -1, :CODES].split(count)
    images[:, position + 1] = (without * (1 - scale) + given * scale).argmax(-1)
  return images[:, 1:].numpy()


def test_greedy_images_with_guidance_are_those_of_min_dalle(theirs, folder):
  config, params = _ours(folder, CODES)
  ours, padded = _texts()
  settings = sampling_settings.SamplingSettings(guidance_scale=10.0, temperature=0.0)
  sampling = decoding.Sampling.of(settings, LENGTH)
  sample = jax.jit(functools.partial(decoding.sample_tokens, config))
  keys = decoding.image_keys(0, jnp.arange(len(ours)))
  found = sample(parameters.for_sampling(config, params), jnp.asarray(ours), keys, sampling)
  expected = _greedy(*theirs, padded, CODES, settings.guidance_scale)
  assert len(np.unique(expected)) > CODES // 2
  np.testing.assert_array_equal(found, expected)
