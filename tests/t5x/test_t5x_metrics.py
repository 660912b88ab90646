"""Metrics for seqio's evaluator, on a handful of made-up pictures and a tiny tokenizer."""

import dataclasses

import flax.linen as nn
import gin
import jax
import numpy as np
import pytest
import tiny_configs

from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data.openmoji import Picture
from parti_jax.models import vit_vqgan
from parti_jax.sampling import detokenizing
from parti_jax.t5x import metrics

_CONFIG = dataclasses.replace(
  tiny_configs.TOKENIZER, codebook_size=12, code_dim=4, dtype='bfloat16'
)
# Image tokens of the real pictures: of each name in each tone.
_TOKENS = {'cook: light': [0, 1, 2, 3], 'cook: dark': [4, 5, 6, 7], 'ball': [8, 9, 10, 11]}


def _picture(caption):
  name, _, tone = caption.partition(': ')
  return Picture(
    code=caption, name=name, tones=(tone,) if tone else (), caption=caption, split='train'
  )


@pytest.fixture(autouse=True)
def _small_world(monkeypatch):
  """A tokenizer of random parameters, and real pictures that it reproduces exactly."""
  init = jax.jit(vit_vqgan.ViTVQGAN(_CONFIG).init)
  params = nn.meta.unbox(init(jax.random.key(0), *vit_vqgan.example_inputs(_CONFIG))['params'])
  # Codes that look different: those of a fresh codebook lie close together.
  params = jax.tree.map(lambda leaf: 4.0 * leaf, params)
  detokenizer = detokenizing.Detokenizer(_CONFIG, params)
  render = lambda code, size: detokenizer(np.array([_TOKENS[code]], np.int32))[0]
  monkeypatch.setattr(
    metrics.frozen_tokenizer,
    'load',
    lambda folder, device: metrics.frozen_tokenizer.FrozenTokenizer(folder, _CONFIG, params),
  )
  monkeypatch.setattr(openmoji, 'pictures', lambda: [_picture(caption) for caption in _TOKENS])
  monkeypatch.setattr(openmoji, 'render', render)
  caches = (metrics._tokenizer, metrics._detokenizer, metrics._judge, metrics._of_caption)
  for cached in caches:
    cached.cache_clear()
  yield
  for cached in caches:
    cached.cache_clear()


def _targets(*captions):
  return [{'caption': caption, 'tokens': _TOKENS[caption]} for caption in captions]


def test_alignment_of_one_and_of_several_pictures():
  light, dark, ball = _TOKENS.values()
  result = metrics.openmoji_alignment(
    _targets('cook: light', 'ball'), [[light, dark], [ball, ball]]
  )
  # Among the pictures in its tones each name is alone here; the tone tells them apart.
  assert result == {
    'name_top1': 100.0,
    'name_top5': 100.0,
    'tone_right': 50.0,
    'reconstruction_name_top1': 100.0,
    'reconstruction_name_top5': 100.0,
    'reconstruction_tone_right': 100.0,
  }
  assert metrics.openmoji_alignment(_targets('cook: light'), [dark])['tone_right'] == 0.0
  assert 'tone_right' not in metrics.openmoji_alignment(_targets('ball'), [np.array(ball)])


def test_name_that_is_not_the_nearest(monkeypatch):
  monkeypatch.setitem(_TOKENS, 'tree', [11, 0, 5, 3])
  result = metrics.openmoji_alignment(_targets('ball'), [_TOKENS['tree']])
  assert (result['name_top1'], result['name_top5']) == (0.0, 100.0)
  assert result['reconstruction_name_top1'] == 100.0


def test_unrecognised_reconstructions_cause_a_warning(monkeypatch, caplog):
  monkeypatch.setitem(_TOKENS, 'tree', [11, 0, 5, 3])
  metrics.openmoji_alignment(_targets('ball', 'tree'), [_TOKENS['ball']] * 2)
  assert not caplog.records
  wrong = [{'caption': 'ball', 'tokens': _TOKENS['tree']}]
  metrics.openmoji_alignment(wrong, [_TOKENS['ball']])
  assert 'openmoji_alignment.tokenizer' in caplog.text


@pytest.mark.parametrize(
  'prediction, named',
  [
    ([0, 1, 2], 'prediction of example 0: 3 tokens'),
    ([0, 1, 2, 12], 'token 3 is 12, but the codebook of this tokenizer has 12 codes'),
  ],
)
def test_tokens_of_another_tokenizer(prediction, named):
  with pytest.raises(UserError, match=named) as caught:
    metrics.openmoji_alignment(_targets('ball'), [prediction])
  assert 'openmoji_alignment.tokenizer' in str(caught.value)


def test_captions_of_other_pictures():
  with pytest.raises(UserError, match="'zebra' is not from OpenMoji"):
    metrics.openmoji_alignment([{'caption': 'zebra', 'tokens': [0] * 4}], [[0] * 4])


def test_the_tokenizer_is_chosen_by_gin(monkeypatch):
  asked = []
  load = metrics.frozen_tokenizer.load
  monkeypatch.setattr(
    metrics.frozen_tokenizer,
    'load',
    lambda folder, device: asked.append((folder, device)) or load(folder, device),
  )
  metrics.openmoji_alignment(_targets('ball'), [_TOKENS['ball']])
  gin.parse_config("openmoji_alignment.tokenizer = 'runs/mine'")
  metrics.openmoji_alignment(_targets('ball'), [_TOKENS['ball']])
  cpu = jax.local_devices(backend='cpu')[0]
  assert asked[0][0].endswith('demo') and asked[0][1] == cpu and asked[1:] == [('runs/mine', cpu)]


def test_a_jax_without_a_cpu_is_an_error(monkeypatch):
  def local_devices(backend=None):
    raise RuntimeError(f'Unknown backend {backend}')

  monkeypatch.setattr(jax, 'local_devices', local_devices)
  with pytest.raises(UserError, match='openmoji_alignment .* JAX_PLATFORMS excludes'):
    metrics.openmoji_alignment(_targets('ball'), [_TOKENS['ball']])


def test_log_likelihood():
  result = metrics.log_likelihood(_targets('ball', 'cook: light'), np.float32([-4.0, -12.0]))
  assert result == {'log_likelihood': -8.0, 'log_likelihood_per_token': -2.0}


def test_postprocess():
  example = {'inputs_pretokenized': 'café'.encode()}
  assert metrics.postprocess([np.int32(3), 4], example, is_target=True) == {
    'caption': 'café',
    'tokens': [3, 4],
  }
  assert metrics.postprocess([[np.int32(3)], [4]], example) == [[3], [4]]
