"""Compares a model's super-resolution with bicubic enlargement."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.evaluation.metrics import reconstruction

# Inputs of the enlargement -> their labels in the report.
INPUTS = {
  'tokenizer': 'pictures through the tokenizer',
  'averaged': 'pictures averaged to that size',
}
_ENLARGED_BY = ('bicubic', 'super_resolution')
_BATCH = 32
# With fewer pictures, a standard error is rough.
_FEW_PICTURES = 30


@dataclasses.dataclass(frozen=True)
class Report:
  """PSNR of enlarged pictures.

  Attributes:
    psnr: the PSNR of each picture in dB, by input (a key of INPUTS) and 'bicubic' or
      'super_resolution'.
    small_size: height and width of the inputs, in pixels.
    large_size: height and width of the enlarged pictures, in pixels.
  """

  psnr: dict[str, dict[str, Float64[np.ndarray, 'pictures']]]
  small_size: int
  large_size: int

  def text(self) -> str:
    """Renders a Markdown table of means in dB and of their differences with standard errors."""
    count = len(self.psnr['tokenizer']['bicubic'])
    lines = [
      f'| {count} pictures, {self.small_size} to {self.large_size} pixels: PSNR in dB | '
      'bicubic | super-resolution | difference |',
      '|---|---|---|---|',
    ]
    for name, what in INPUTS.items():
      bicubic, ours = (self.psnr[name][how] for how in _ENLARGED_BY)
      lines.append(
        f'| {what} | {bicubic.mean():.2f} | {ours.mean():.2f} | {_with_error(ours - bicubic)} |'
      )
    if count < _FEW_PICTURES:
      lines.append(
        f'Standard errors over fewer than {_FEW_PICTURES} pictures are rough, and undefined '
        'for one picture.'
      )
    return '\n'.join(lines)

  def json(self) -> dict[str, Any]:
    """Returns the means as plain values."""
    return {
      'pictures': len(self.psnr['tokenizer']['bicubic']),
      'small_size': self.small_size,
      'large_size': self.large_size,
      'psnr': {
        name: {how: float(values.mean()) for how, values in of_input.items()}
        for name, of_input in self.psnr.items()
      },
    }


@dataclasses.dataclass(frozen=True)
class Sample:
  """Pictures for a contact sheet.

  Attributes:
    inputs: the tokenizer's reconstructions.
    bicubic: the inputs enlarged by interpolation.
    super_resolution: the inputs enlarged by the model.
    pictures: the original pictures.
  """

  inputs: UInt8[np.ndarray, 'pictures small_size small_size 3']
  bicubic: UInt8[np.ndarray, 'pictures large_size large_size 3']
  super_resolution: UInt8[np.ndarray, 'pictures large_size large_size 3']
  pictures: UInt8[np.ndarray, 'pictures large_size large_size 3']


def evaluate(
  model, pictures: Iterator[UInt8[np.ndarray, 'size size 3']], num_samples: int = 8
) -> tuple[Report, Sample]:
  """Measures a model's super-resolution.

  Args:
    model: a TextToImage with an upscaler.
    pictures: pictures whose height and width are those of the model, times the upscaler's factor.
    num_samples: pictures to keep, spread evenly over all.

  Raises:
    UserError: if there are no pictures.
  """
  psnr: dict[str, dict[str, list[np.ndarray]]] = {
    name: {how: [] for how in _ENLARGED_BY} for name in INPUTS
  }
  samples = []
  while batch := list(itertools.islice(pictures, _BATCH)):
    large = np.stack(batch)
    small = _averaged(large, model.upscaler.factor)
    inputs = {'tokenizer': model.reconstruct(small), 'averaged': small}
    enlarged = {
      name: {
        'bicubic': _bicubic(images, large.shape[1]),
        'super_resolution': model.upscale(images),
      }
      for name, images in inputs.items()
    }
    for name, how in itertools.product(INPUTS, _ENLARGED_BY):
      psnr[name][how].append(reconstruction.psnr(enlarged[name][how], large))
    samples.append((inputs['tokenizer'], *enlarged['tokenizer'].values(), large))
  if not samples:
    raise UserError('no pictures to enlarge')
  parts = [np.concatenate(part) for part in zip(*samples)]
  chosen = np.linspace(0, len(parts[0]) - 1, min(num_samples, len(parts[0]))).round().astype(int)
  report = Report(
    {
      name: {how: np.concatenate(values) for how, values in of_input.items()}
      for name, of_input in psnr.items()
    },
    model.image_size,
    parts[-1].shape[1],
  )
  return report, Sample(*(part[chosen] for part in parts))


def sheet(sample: Sample, columns: int = 2) -> Image.Image:
  """Shows side by side: the input as large pixels, bicubic, super-resolution, the original."""
  factor = sample.pictures.shape[1] // sample.inputs.shape[1]
  columns = min(columns, len(sample.inputs))
  pixels = sample.inputs.repeat(factor, axis=1).repeat(factor, axis=2)
  rows = np.concatenate([pixels, sample.bicubic, sample.super_resolution, sample.pictures], axis=2)
  rows = rows[: len(rows) // columns * columns]
  page = rows.reshape(len(rows) // columns, columns, *rows.shape[1:])
  return Image.fromarray(np.concatenate(np.concatenate(page, axis=1), axis=1))


def _averaged(
  images: UInt8[np.ndarray, 'pictures large large 3'], factor: int
) -> UInt8[np.ndarray, 'pictures small small 3']:
  """Averages pictures over squares of factor × factor pixels."""
  count, side, _, channels = images.shape
  size = side // factor
  squares = images.reshape(count, size, factor, size, factor, channels)
  return np.round(squares.mean(axis=(2, 4))).astype(np.uint8)


def _bicubic(
  images: UInt8[np.ndarray, 'pictures height width 3'], size: int
) -> UInt8[np.ndarray, 'pictures {size} {size} 3']:
  return np.stack(
    [
      np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
      for image in images
    ]
  )


def _with_error(values: Float64[np.ndarray, 'pictures']) -> str:
  error = f' ± {values.std(ddof=1) / len(values) ** 0.5:.2f}' if len(values) > 1 else ''
  return f'{values.mean():+.2f}{error}'
