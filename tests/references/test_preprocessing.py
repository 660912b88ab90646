"""Preprocessing against transformers, torchvision as open_clip uses it, and HPSv2's functions."""

import numpy as np
import PIL.Image
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
open_clip = pytest.importorskip('open_clip')
functional = pytest.importorskip('torchvision.transforms.functional')

from transformers.models.clip import image_processing_pil_clip  # noqa: E402
from transformers.models.siglip import image_processing_pil_siglip  # noqa: E402

from parti_jax.exported_model import preprocessing  # noqa: E402
from parti_jax.models import clip  # noqa: E402

SIZE = 24
# Odd ones, smaller and larger than the network's, equal to it, and long ones.
SHAPES = [(24, 24), (25, 24), (24, 31), (37, 53), (101, 58), (17, 9), (7, 64), (3, 100), (24, 48)]


def _pictures():
  draw = np.random.default_rng(0)
  # Smooth ones with noise: of noise alone, all resized pictures look the same.
  for height, width in SHAPES:
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / (3 + c)) + np.cos(columns / (5 - c)) for c in range(3)], -1)
    yield np.uint8(np.clip(waves * 60 + 127 + draw.normal(0, 25, waves.shape), 0, 255))


def _ours(how):
  return preprocessing.preprocess(_pictures(), SIZE, how).transpose(0, 3, 1, 2)


def _theirs(processor):
  pictures = [PIL.Image.fromarray(picture) for picture in _pictures()]
  return np.stack(processor(pictures, return_tensors='np')['pixel_values'])


def test_clip_of_transformers():
  mean, std = (np.array(part)[:, None, None] for part in (clip.PIXEL_MEAN, clip.PIXEL_STD))
  ours = (_ours(preprocessing.Preprocessing()) - mean) / std
  settings = {'size': {'shortest_edge': SIZE}, 'crop_size': {'height': SIZE, 'width': SIZE}}
  processor = image_processing_pil_clip.CLIPImageProcessorPil(**settings)
  np.testing.assert_allclose(ours, _theirs(processor), atol=1e-5)
  # Its other form resizes uint8 with torch, one step of 256 away at the most.
  processor = transformers.CLIPImageProcessor(**settings)
  assert np.abs(ours - _theirs(processor)).max() < 1.01 / 255 / 0.26


@pytest.mark.parametrize('code, resampling', [(2, 'bilinear'), (3, 'bicubic')])
def test_siglip_of_transformers(code, resampling):
  ours = _ours(preprocessing.Preprocessing('stretch', resampling)) * 2 - 1
  settings = {'size': {'height': SIZE, 'width': SIZE}, 'resample': code}
  processor = image_processing_pil_siglip.SiglipImageProcessorPil(**settings)
  np.testing.assert_allclose(ours, _theirs(processor), atol=1e-5)
  processor = transformers.SiglipImageProcessor(**settings)
  assert np.abs(ours - _theirs(processor)).max() < 1.01 / 255 / 0.5


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('mode, fit', [('shortest', 'crop'), ('squash', 'stretch')])
def test_open_clip(interpolation, mode, fit):
  transform = open_clip.image_transform(
    SIZE,
    is_train=False,
    mean=[0.0] * 3,
    std=[1.0] * 3,
    interpolation=interpolation,
    resize_mode=mode,
  )
  theirs = np.stack([transform(PIL.Image.fromarray(picture)) for picture in _pictures()])
  ours = _ours(preprocessing.Preprocessing(fit, interpolation, 'even'))
  np.testing.assert_allclose(ours, theirs, atol=1e-6)
  if fit == 'crop':  # Half a pixel matters in some of them.
    down = _ours(preprocessing.Preprocessing(fit, interpolation, 'down'))
    assert (np.abs(down - theirs).max(axis=(1, 2, 3)) > 0.01).any()


def _hpsv2(picture):
  """Resizes the longer side as HPSv2's `ResizeMaxSize` does, and pads."""
  image = functional.to_tensor(PIL.Image.fromarray(picture))
  scale = SIZE / max(image.shape[1:])
  size = [max(1, round(side * scale)) for side in image.shape[1:]]
  if scale != 1:
    image = functional.resize(image, size, functional.InterpolationMode.BICUBIC, antialias=True)
  rows, columns = (SIZE - side for side in size)
  around = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
  return functional.pad(image, around, fill=0)


def test_hpsv2():
  theirs = np.stack([_hpsv2(picture) for picture in _pictures()])
  ours = _ours(preprocessing.Preprocessing('pad'))
  np.testing.assert_allclose(ours, theirs, atol=2e-6)
  assert (theirs == 0).any()
