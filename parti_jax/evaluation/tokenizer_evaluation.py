"""Measures how well an image tokenizer reconstructs pictures, and how it uses its codes.

| value | of |
|---|---|
| rFID | the reconstructions as a set against the pictures, over Inception's pool |
| PSNR, SSIM, LPIPS | each reconstruction and its picture; their means |
| codes used, perplexity | the tokens of all pictures |

Pictures are cropped and resized to the tokenizer's size, and reconstructions are rounded to bytes before
anything is measured. The network computes in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import PyTree
from jaxtyping import UInt8

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.evaluation import feature_blocks
from parti_jax.evaluation import measurement
from parti_jax.evaluation import samples_evaluation
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.metrics import features as features_lib
from parti_jax.evaluation.metrics import reconstruction
from parti_jax.models import image_tokenizers
from parti_jax.models import lpips
from parti_jax.models import pixels
from parti_jax.partitioning import device_groups

_PAIRS = ('psnr', 'ssim', 'lpips')
_FEW_PICTURES = 30
_OF_PICTURES = 'standard error over pictures'


class Perceptual(NamedTuple):
  """LPIPS and its weights.

  Attributes:
    network: one of `lpips.NETWORKS`.
    params: the parameters.
    digests: SHA-256 of the files of the network and of the linear layers.
  """

  network: str
  params: PyTree
  digests: tuple[str, str]


class Reconstructions(NamedTuple):
  """What a tokenizer makes of pictures.

  Attributes:
    images: the reconstructions.
    tokens: the tokens.
    ssim: similarity of each reconstruction and its picture.
    lpips: distance of each reconstruction and its picture; None without LPIPS.
  """

  images: UInt8[np.ndarray, 'pictures size size 3']
  tokens: Int32[np.ndarray, 'pictures tokens']
  ssim: Float32[np.ndarray, 'pictures']
  lpips: Float32[np.ndarray, 'pictures'] | None


class Reconstructor:
  """A tokenizer on all devices of this process; the results for a picture don't depend on the batch.

  Args:
    config: its config.
    params: its parameters.
    perceptual: LPIPS; None to leave it out.

  Raises:
    UserError: pictures of the tokenizer aren't square, or too small for SSIM or LPIPS.
  """

  def __init__(
    self, config: image_tokenizers.Config, params: PyTree, perceptual: Perceptual | None = None
  ):
    least = max(
      reconstruction.WINDOW, lpips.least_size(perceptual.network) if perceptual is not None else 0
    )
    size = image_sizes.square(config.image_size, 'the evaluation of a tokenizer compares')
    if size < least:
      raise UserError(
        f"the tokenizer's pictures of {size} pixels are smaller than {least}, the least "
        'for SSIM and LPIPS'
      )
    fixed: Any = config
    module = image_tokenizers.module(dataclasses.replace(fixed, dtype='float32'))
    apply: Callable[..., Any] = module.apply
    distance: Callable[..., Any] | None = None
    if perceptual is not None:
      distance = lpips.LPIPS(network=perceptual.network, precision=jax.lax.Precision.HIGHEST).apply

    def reconstructed(params, images):
      variables = {'params': params['tokenizer']}
      tokens = apply(variables, pixels.from_bytes(images), method='tokenize')
      found = pixels.to_bytes(apply(variables, tokens, method='detokenize'))
      apart = None
      if distance is not None:
        pair = pixels.from_bytes(found), pixels.from_bytes(images)
        apart = distance({'params': params['lpips']}, *pair)
      return found, tokens, reconstruction.ssim(found, images), apart

    self._run = device_groups.DeviceGroups(
      reconstructed,
      {'tokenizer': params, 'lpips': None if perceptual is None else perceptual.params},
      jax.local_devices(),
    )

  def __call__(self, images: UInt8[np.ndarray, 'pictures size size 3']) -> Reconstructions:
    """Reconstructs pictures of the tokenizer's size."""
    parts = self._run(images)()
    joined: list[Any] = [
      None if part[0] is None else np.concatenate(part)[: len(images)] for part in zip(*parts)
    ]
    return Reconstructions(*joined)


def params_digest(params: PyTree) -> str:
  """Returns a digest of all parameters of a tokenizer, the decoder's too."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    found.update(f'{jax.tree_util.keystr(path)} {array.shape} {array.dtype}'.encode())
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()


def compute(
  pictures: picture_sets.PictureSet,
  reconstructor: Reconstructor,
  config: image_tokenizers.Config,
  extractor: features_lib.Extractor,
  stores: tuple[feature_blocks.Store, feature_blocks.Store],
  max_pictures: int | None = None,
  progress: bool = False,
) -> None:
  """Computes what the stores don't have yet.

  Args:
    pictures: the pictures.
    reconstructor: the tokenizer.
    config: its config.
    extractor: the network whose features are compared.
    stores: for the pictures and for their reconstructions.
    max_pictures: use only the first pictures, rounded up to whole blocks; None for all.
    progress: whether to show a bar on a terminal.

  Raises:
    UserError: pictures can't be read.
  """
  size = image_sizes.square(config.image_size, 'the evaluation of a tokenizer compares')
  originals, others = stores
  most = None if max_pictures is None else -(-max_pictures // picture_sets.BLOCK)
  total = pictures.count
  if most is not None:
    total = min(most * picture_sets.BLOCK, total or most * picture_sets.BLOCK)

  def wanted(index: int) -> bool:
    return (most is None or index < most) and not others.has(index)

  with tqdm.tqdm(
    total=total, desc='pictures', unit='picture', disable=None if progress else True
  ) as bar:
    count = 0
    for block in pictures.blocks(size, wanted):
      if count == most:
        break
      if block is not None:
        _compute_block(count, block, reconstructor, config, extractor, stores)
      count += 1
      bar.update(picture_sets.BLOCK if total is None else min(picture_sets.BLOCK, total - bar.n))
  originals.count = others.count = count


def _compute_block(
  index: int,
  block: picture_sets.Block,
  reconstructor: Reconstructor,
  config: image_tokenizers.Config,
  extractor: features_lib.Extractor,
  stores: tuple[feature_blocks.Store, feature_blocks.Store],
) -> None:
  arrays: list[dict[str, np.ndarray]] = [{}, {}]
  if len(block.images):
    found = reconstructor(block.images)
    for part, images in zip(arrays, (block.images, found.images)):
      part['values'] = features_lib.extract(extractor, [images]).values
    arrays[1] |= {
      'psnr': reconstruction.psnr(found.images, block.images),
      'ssim': found.ssim,
      'codes': np.bincount(found.tokens.ravel(), minlength=config.codebook_size),
    }
    if found.lpips is not None:
      arrays[1]['lpips'] = found.lpips
  # The reconstructions come last, so that a block that has them is complete.
  for store, part in zip(stores, arrays):
    store.write(index, part, samples_evaluation.facts_of(block))


def evaluate(
  pictures: picture_sets.PictureSet,
  config: image_tokenizers.Config,
  tokenizer: Mapping[str, Any],
  extractor: features_lib.Extractor,
  of_features: Mapping[str, Any],
  stores: tuple[feature_blocks.Store, feature_blocks.Store],
  perceptual: Perceptual | None = None,
) -> measurement.Measurement:
  """Measures a tokenizer whose reconstructions are computed.

  Args:
    pictures: the pictures.
    config: the tokenizer's config.
    tokenizer: what the measurement says of the tokenizer.
    extractor: the network whose features are compared.
    of_features: what the protocol says of it, such as the digest of its weights.
    stores: of the pictures and of their reconstructions.
    perceptual: LPIPS; None if it was left out.

  Returns:
    The measurement.

  Raises:
    UserError: there are too few pictures.
  """
  facts = samples_evaluation.facts(stores[0], pictures.place)
  remarks = samples_evaluation.skipped(pictures.place, facts)
  key = 'rfid' if of_features['network'].startswith('Inception') else 'frechet_distance'
  gaussian = samples_evaluation.gaussian_of(stores[0].arrays('values'), pictures.place)
  value, found = samples_evaluation.distance(
    stores[1], 'values', gaussian, pictures.place, facts.pictures
  )
  values: dict[str, measurement.Value] = {} if value is None else {key: value}
  remarks += [f'{measurement.MEANINGS[key].label}: {remark}' for remark in found]
  for name in _PAIRS:
    parts = list(stores[1].arrays(name))
    if parts:
      values[name] = _mean(np.concatenate(parts))
  if perceptual is None:
    remarks.append('LPIPS: left out, since its weights were not given.')
  codes: np.ndarray = sum(stores[1].arrays('codes'), np.zeros(config.codebook_size, np.int64))
  use = reconstruction.code_use(codes)
  values |= {
    'codes_used': measurement.Value(use.used),
    'code_perplexity': measurement.Value(use.perplexity),
  }
  if codes.sum() < 10 * config.codebook_size:
    remarks.append(
      f'Codes: {codes.sum():,} tokens are few for {config.codebook_size:,} codes, so the share and the '
      'perplexity would grow with more pictures.'
    )
  if facts.pictures < _FEW_PICTURES:
    remarks.append(f'Standard errors over {facts.pictures} pictures are rough.')
  return measurement.Measurement(
    'tokenizer',
    {
      **facts.protocol(),
      'crop': 'central square',
      'digest': facts.digest,
      'features': of_features,
      'psnr': 'of uint8 RGB, mean over pictures',
      'ssim': f'Gaussian window of {reconstruction.WINDOW}, of each color of uint8 RGB',
      'lpips': 'none'
      if perceptual is None
      else {
        'network': perceptual.network,
        'network_weights': perceptual.digests[0],
        'lpips_weights': perceptual.digests[1],
      },
      'dtype': 'float32',
    },
    {'tokenizer': tokenizer, 'pictures': pictures.place, 'network': extractor.name},
    values,
    remarks,
  )


def _mean(values: np.ndarray) -> measurement.Value:
  """Returns a mean over pictures and its standard error."""
  count = len(values)
  error = float(values.std(ddof=1, dtype=np.float64) / count**0.5) if count > 1 else None
  return measurement.Value(
    float(values.mean(dtype=np.float64)), error, _OF_PICTURES if count > 1 else ''
  )
