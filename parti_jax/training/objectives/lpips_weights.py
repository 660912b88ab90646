"""Reads the weights of LPIPS from the files of torchvision and of the `lpips` package."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.models import lpips


def read(vgg16_path: str | os.PathLike, lpips_path: str | os.PathLike) -> dict[str, Any]:
  """Reads the parameters of `lpips.LPIPS`.

  Args:
    vgg16_path: torchvision's state dict of `vgg16`, such as vgg16-397923af.pth, with
      'features.0.weight' and so on; or a .safetensors file with the same names. Only the
      convolutions are read.
    lpips_path: the linear layers of the `lpips` package, weights/v0.1/vgg.pth, with
      'lin0.model.1.weight' to 'lin4.model.1.weight'; or a .safetensors file with the same names.

  Returns:
    A tree of float32 numpy arrays.

  Raises:
    UserError: if a file is missing or damaged, or an array in it is missing or has another shape.
    ModuleNotFoundError: for a .pth file if torch isn't installed.
  """
  trunk, heads = _read_file(vgg16_path), _read_file(lpips_path)
  vgg16: dict[str, dict[str, np.ndarray]] = {}
  params: dict[str, Any] = {}
  index, channels = 0, 3
  for stage, widths in enumerate(lpips.VGG16):
    for place, width in enumerate(widths):
      kernel = _array(trunk, f'features.{index}.weight', (width, channels, 3, 3), vgg16_path)
      bias = _array(trunk, f'features.{index}.bias', (width,), vgg16_path)
      vgg16[f'stage_{stage}_{place}'] = {
        'kernel': np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)),
        'bias': bias,
      }
      index, channels = index + 2, width  # A ReLU follows each convolution,
    index += 1  # and a pooling layer each stage.
    head = _array(heads, f'lin{stage}.model.1.weight', (1, channels, 1, 1), lpips_path)
    params[f'head_{stage}'] = head.reshape(-1)
  return {'vgg16': vgg16} | params


def of_objective(objective: Any) -> dict[str, Any]:
  """Reads the files of an objective.

  Args:
    objective: an objective with the fields `perceptual_weight`, `vgg16_weights` and
      `lpips_weights`.

  Returns:
    The result of `read`.

  Raises:
    UserError: if a file is not given, is missing or damaged.
  """
  kind = type(objective).__name__
  for name in ('vgg16_weights', 'lpips_weights'):
    if getattr(objective, name) is None:
      raise errors.UserError(
        f'{kind}.perceptual_weight={objective.perceptual_weight} needs the file {kind}.{name} '
        f'(docs/tokenizer.md); or set the weight to 0 with --gin.{kind}.perceptual_weight=0'
      )
  return read(objective.vgg16_weights, objective.lpips_weights)


def _read_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.UserError(
      f'{path}: no such file of weights; docs/tokenizer.md says where to get it'
    )
  storage.check_size(path, storage.MAX_WEIGHTS)
  try:
    if path.suffix == '.safetensors':
      return safetensors.numpy.load_file(path)
    return _read_torch_file(path)
  except ModuleNotFoundError:
    raise
  except Exception as error:
    # Which errors torch raises depends on where a file is damaged.
    reason = str(error).split('\n', maxsplit=1)[0]
    raise errors.UserError(
      f'{path}: not a readable file of weights ({reason}); download it again as docs/tokenizer.md describes'
    ) from error


def _read_torch_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  import torch

  # Only arrays: torch refuses files that would run code.
  loaded = torch.load(path, map_location='cpu', weights_only=True)
  return {name: tensor.numpy() for name, tensor in loaded.items()}


def _array(
  arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], path: str | os.PathLike
) -> np.ndarray:
  if name not in arrays or arrays[name].shape != shape:
    found = list(arrays[name].shape) if name in arrays else 'missing'
    raise errors.UserError(
      f'{path}: {name} is {found} instead of {list(shape)}; get the file of this network as '
      'docs/tokenizer.md says'
    )
  return np.asarray(arrays[name], np.float32)
