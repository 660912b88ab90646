"""Compares samples with a reference by the protocol of ADM's evaluator.

Dhariwal and Nichol 2021 (arXiv 2105.05233); their evaluator reads samples from an .npz and compares them
with another .npz, of pictures or of their statistics:

| value | over |
|---|---|
| FID | Inception's pool of 2,048 features |
| sFID | 7 feature maps of mixed_6d at 17 × 17 places |
| inception score | the logits, in parts of 5,000 pictures in their order |
| precision, recall | the pool, k = 3 |

Pictures are read in blocks, and their features are kept in files (`feature_blocks`), so that commands go
on where they stopped and several processes share the work. Means and covariances are summed in float64
over the blocks.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.evaluation import class_samples
from parti_jax.evaluation import feature_blocks
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.metrics import features as features_lib
from parti_jax.evaluation.metrics import frechet
from parti_jax.evaluation.metrics import inception_score
from parti_jax.evaluation.metrics import precision_recall
from parti_jax.importers import npz_files

# With fewer pictures, the balls of precision and recall are too large.
_FEW_PICTURES = 100
# With fewer pictures for each feature, the standard error of a Fréchet distance is rough.
_ROUGH = 5
# Statistics in an .npz of ADM: of the pool, and of the spatial features.
_STATISTICS = {'values': ('mu', 'sigma'), 'spatial': ('mu_s', 'sigma_s')}
_LOSSLESS = {'PNG', 'uint8 array'}
_OF_PICTURES = 'standard error over pictures'


@dataclasses.dataclass(frozen=True)
class Reference:
  """What samples are compared with.

  Attributes:
    place: its path.
    statistics: {name of features: their Gaussian}, from a file; {} if they come from the pictures.
    pictures: its pictures; None if the file has only statistics.
    digest: SHA-256 of the statistics; '' without them.
  """

  place: str
  statistics: Mapping[str, frechet.Gaussian]
  pictures: picture_sets.PictureSet | None
  digest: str

  def identity(self) -> str:
    """Returns a text that changes with the reference."""
    return f'{self.digest} {self.pictures.identity() if self.pictures else ""}'


def open_reference(path: str) -> Reference:
  """Opens an .npz of pictures or statistics, or a folder of pictures.

  Raises:
    UserError: it is neither, or is damaged; the message names --reference.
  """
  try:
    return _open_reference(path)
  except UserError as error:
    raise UserError(f'--reference: {error}') from error


def _open_reference(path: str) -> Reference:
  found = pathlib.Path(path)
  if found.suffix != '.npz' or not found.is_file():
    return Reference(path, {}, picture_sets.open_path(path), '')
  arrays = npz_files.open_npz(found)
  if 'mu' not in arrays:
    return Reference(path, {}, picture_sets.NpzSet(found, arrays), '')
  statistics, digest = {}, hashlib.sha256()
  for name, (mean, covariance) in _STATISTICS.items():
    if mean in arrays or covariance in arrays:
      gaussian = _gaussian(path, arrays, mean, covariance)
      statistics[name] = gaussian
      digest.update(gaussian.mean.tobytes() + gaussian.covariance.tobytes())
  pictures = picture_sets.NpzSet(found, arrays) if 'arr_0' in arrays else None
  return Reference(path, statistics, pictures, digest.hexdigest())


def _gaussian(
  path: str, arrays: Mapping[str, npz_files.NpzArray], mean: str, covariance: str
) -> frechet.Gaussian:
  if mean not in arrays or covariance not in arrays:
    raise UserError(f'{path} has only one of {mean} and {covariance}')
  shapes = [list(arrays[name].shape) for name in (mean, covariance)]
  if len(shapes[0]) != 1 or shapes[1] != 2 * shapes[0]:
    raise UserError(
      f'{path}: {mean} {shapes[0]} and {covariance} {shapes[1]} are not a mean and a covariance'
    )
  for name in (mean, covariance):
    if arrays[name].dtype.kind not in 'fiu':
      raise UserError(f'{path}: {name} is {arrays[name].dtype}; expected real numbers')
  values = [arrays[name].read().astype(np.float64) for name in (mean, covariance)]
  if not all(np.all(np.isfinite(array)) for array in values):
    raise UserError(f'{path}: {mean} or {covariance} has values that are not finite')
  if not frechet.is_covariance(values[1]):
    raise UserError(
      f"{path}: {covariance} is not a covariance, since it isn't symmetric or has negative eigenvalues"
    )
  return frechet.Gaussian(*values)


def compute(
  pictures: picture_sets.PictureSet,
  extractor: features_lib.Extractor,
  store: feature_blocks.Store,
  image_size: int | None,
  worker: tuple[int, int] = (0, 1),
  progress: str = '',
) -> None:
  """Computes the features of the blocks that a store doesn't have yet.

  Args:
    pictures: the pictures.
    extractor: the network.
    store: where features are kept.
    image_size: height and width to resize to; None for the pictures' own.
    worker: (index, number) of processes that share the blocks.
    progress: what a bar on a terminal says; '' for none.

  Raises:
    UserError: pictures can't be read.
  """
  index, number = worker
  count = pictures.count
  assert count is not None
  blocks = -(-count // picture_sets.BLOCK)
  store.count = blocks

  def wanted(block: int) -> bool:
    return block % number == index and not store.has(block)

  if not any(map(wanted, range(blocks))):
    return
  with tqdm.tqdm(
    total=count, desc=progress, unit='picture', disable=None if progress else True
  ) as bar:
    for place, block in enumerate(pictures.blocks(image_size, wanted)):
      if block is not None:
        found: dict[str, np.ndarray] = {}
        if len(block.images):
          extracted = features_lib.extract(extractor, [block.images])
          found = {
            name: values
            for name in ('values', 'logits', 'spatial')
            if (values := getattr(extracted, name)) is not None
          }
        store.write(place, found, facts_of(block))
      bar.update(min(picture_sets.BLOCK, count - bar.n))


def facts_of(block: picture_sets.Block) -> dict[str, Any]:
  """Returns what a store keeps of a block besides arrays."""
  return {
    'pictures': len(block.images),
    'size': list(block.images.shape[1:3]) if len(block.images) else None,
    'skipped': block.skipped,
    'formats': list(block.formats),
    'resized': block.resized,
    'digest': block.digest,
  }


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a store knows of its pictures.

  Attributes:
    pictures: number of pictures.
    size: their height and width, in pixels.
    skipped: reason -> number of pictures left out.
    compression: whether the files have all pixels unchanged, or in which formats they are.
    resized: number of pictures that were resized.
    digest: SHA-256 of the blocks' digests.
  """

  pictures: int
  size: tuple[int, int] | None
  skipped: Mapping[str, int]
  compression: str
  resized: int
  digest: str

  def protocol(self) -> dict[str, Any]:
    """Returns the entries of a protocol."""
    return {
      'pictures': self.pictures,
      'picture_size': self.size and list(self.size),
      'resize': picture_sets.RESIZE_FILTER if self.resized else 'none',
      'compression': self.compression,
    }


def facts(store: feature_blocks.Store, place: str) -> Facts:
  """Sums up what a store knows of its pictures.

  Raises:
    UserError: blocks have pictures of several sizes, or none has a picture.
  """
  skipped: collections.Counter[str] = collections.Counter()
  formats, sizes, digest = set(), set(), hashlib.sha256()
  pictures = resized = 0
  for block in store.facts():
    pictures += block['pictures']
    resized += block['resized']
    skipped.update(block['skipped'])
    formats |= set(block['formats'])
    sizes |= {tuple(block['size'])} if block['size'] else set()
    digest.update(bytes.fromhex(block['digest']))
  if not pictures:
    reasons = ', '.join(f'{count:,} {reason}' for reason, count in skipped.most_common())
    raise UserError(f'{place} has no usable picture ({reasons or "it is empty"})')
  if len(sizes) > 1:
    shown = ' and '.join(f'{height}×{width}' for height, width in sorted(sizes)[:3])
    raise UserError(
      f'{place} has pictures of {shown} pixels; give --image_size to crop and resize all of them'
    )
  lossy = sorted(formats - _LOSSLESS)
  return Facts(
    pictures,
    next(iter(sizes)),
    dict(skipped),
    ', '.join(lossy + (['lossless'] if formats & _LOSSLESS else [])),
    resized,
    digest.hexdigest(),
  )


def evaluate(
  samples: picture_sets.PictureSet,
  reference: Reference,
  extractor: features_lib.Extractor,
  of_features: Mapping[str, Any],
  stores: tuple[feature_blocks.Store, feature_blocks.Store],
) -> measurement.Measurement:
  """Measures samples whose features are computed.

  Args:
    samples: the samples.
    reference: what they are compared with.
    extractor: the network.
    of_features: what the protocol says of it, such as the digest of its weights.
    stores: the features of the samples and of the reference's pictures.

  Returns:
    The measurement.

  Raises:
    UserError: there are too few pictures, or samples and reference don't fit each other.
  """
  of_samples = facts(stores[0], samples.place)
  of_reference = facts(stores[1], reference.place) if reference.pictures is not None else None
  if of_reference is not None:
    check_sizes((samples.place, of_samples.size), (reference.place, of_reference.size))
  remarks = skipped(samples.place, of_samples)
  if of_reference is not None:
    remarks += skipped(reference.place, of_reference)
  values: dict[str, measurement.Value] = {}
  scored = next(stores[0].arrays('logits'), None) is not None
  names = {'values': 'fid' if scored else 'frechet_distance', 'spatial': 'sfid'}
  for name, key in names.items():
    gaussian = reference.statistics.get(name)
    if gaussian is None and not reference.statistics:
      gaussian = gaussian_of(stores[1].arrays(name), reference.place)
    counted = None if reference.statistics or of_reference is None else of_reference.pictures
    value, found = distance(stores[0], name, gaussian, samples.place, counted)
    values |= {} if value is None else {key: value}
    remarks += [f'{measurement.MEANINGS[key].label}: {remark}' for remark in found]
  if scored:
    values['inception_score'], found = _inception_score(stores[0])
    remarks += found + _sorted_classes(samples)
  if of_reference is None:
    remarks.append('Precision, recall: left out, since the reference has no pictures.')
  else:
    found_values, found = _precision_recall(*stores)
    values |= found_values
    remarks += found
  return measurement.Measurement(
    'samples',
    {
      **of_samples.protocol(),
      'reference': _reference_protocol(reference, of_reference),
      'features': of_features,
      'inception_score': f'parts of {inception_score.PART:,} in the given order'
      if scored
      else 'none',
      'precision_recall': f'k = {precision_recall.NEIGHBORS}, float64',
    },
    {
      'samples': samples.place,
      'digest': of_samples.digest,
      'reference': reference.place,
      'network': extractor.name,
      **_drawn_with(samples.place),
    },
    values,
    remarks,
  )


def check_network(reference: Reference, extractor: features_lib.Extractor, size: int) -> None:
  """Raises UserError if a reference has statistics of other features than a network's.

  Args:
    reference: the reference.
    extractor: the network.
    size: height and width of the samples, in pixels.
  """
  if not reference.statistics:
    return
  found = features_lib.extract(extractor, [np.zeros((1, size, size, 3), np.uint8)])
  for name, gaussian in reference.statistics.items():
    values = getattr(found, name)
    if values is not None:
      _check_features(f'--reference {reference.place}', gaussian, values.shape[1])


def _check_features(place: str, gaussian: frechet.Gaussian, dim: int) -> None:
  if len(gaussian.mean) != dim:
    raise UserError(
      f"{place} has statistics of {len(gaussian.mean):,} features, but the network's are {dim:,}; it was "
      'made with another network'
    )


def _reference_protocol(reference: Reference, of_reference: Facts | None) -> dict[str, Any]:
  found: dict[str, Any] = {}
  if reference.statistics:
    found['statistics'] = reference.digest
  if of_reference is not None:
    found |= {**of_reference.protocol(), 'digest': of_reference.digest}
  return found


def check_sizes(
  samples: tuple[str, tuple[int, int] | None], reference: tuple[str, tuple[int, int] | None]
) -> None:
  """Raises UserError if samples and reference, by place and size, have different known sizes."""
  (place, size), (other, other_size) = samples, reference
  if size is not None and other_size is not None and size != other_size:
    raise UserError(
      f'{place} has pictures of {size[0]}×{size[1]} pixels, but {other} of '
      f'{other_size[0]}×{other_size[1]}; give --image_size to crop and resize both, which the protocol '
      'then says'
    )


def gaussian_of(features: Iterable[np.ndarray], place: str) -> frechet.Gaussian | None:
  """Sums features over blocks and returns their Gaussian; None without such features.

  Raises:
    UserError: there are fewer than two pictures.
  """
  total: frechet.Moments | None = None
  for block in features:
    moments = frechet.Moments.of(block)
    total = moments if total is None else total + moments
  if total is None:
    return None
  check_number(total.count, place)
  return total.gaussian()


def check_number(pictures: int, place: str) -> None:
  """Raises UserError if there are fewer than two pictures."""
  if pictures < 2:
    raise UserError(f'{place} has one usable picture; a distance needs at least two')


def distance(
  store: feature_blocks.Store,
  name: str,
  other: frechet.Gaussian | None,
  place: str,
  other_count: int | None = None,
) -> tuple[measurement.Value | None, list[str]]:
  """Returns a store's Fréchet distance from a Gaussian, with its standard error, and remarks.

  Args:
    store: the features.
    name: which of them.
    other: the Gaussian; None if there is none to compare with.
    place: where the pictures are, for messages.
    other_count: number of pictures of the Gaussian; None if unknown.

  Raises:
    UserError: the Gaussian is of other features, or there are fewer than two pictures.
  """
  one = gaussian_of(store.arrays(name), place)
  if one is None:
    return None, []
  if other is None:
    return None, ['left out, since the reference has no statistics of these features.']
  dim, count = len(one.mean), sum(map(len, store.arrays(name)))
  _check_features('the reference', other, dim)
  value = frechet.distance(one, other)
  least = count if other_count is None else min(count, other_count)
  if least <= dim:
    return measurement.Value(value), [
      f'no more pictures ({least:,}) than the {dim:,} features, so a covariance is singular, the value '
      'is mostly small-sample bias, and it has no standard error.'
    ]
  influence = frechet.Influence(one, other)
  square = sum(float(np.sum(np.square(influence.of(block)))) for block in store.arrays(name))
  error = (square / (count - 1) / count) ** 0.5
  remarks = []
  if count < _ROUGH * dim:
    remarks.append(
      f'{count:,} pictures are fewer than {_ROUGH} for each of the {dim:,} features, so the standard '
      'error is rough.'
    )
  return measurement.Value(value, error, f'{_OF_PICTURES} (delta method)'), remarks


def _inception_score(store: feature_blocks.Store) -> tuple[measurement.Value, list[str]]:
  parts = inception_score.Consecutive()
  for logits in store.arrays('logits'):
    parts.add(logits)
  scores = parts.scores()
  remarks = []
  count = sum(map(len, store.arrays('logits')))
  if count < inception_score.PART:
    remarks.append(
      f'Inception score: of one part of {count:,} pictures instead of {inception_score.PART:,}; it grows '
      'with the number of pictures.'
    )
  deviation = float(np.std(scores)) if len(scores) > 1 else None
  of_what = f'deviation over {len(scores)} parts' if len(scores) > 1 else ''
  return measurement.Value(float(np.mean(scores)), deviation, of_what), remarks


def _sorted_classes(samples: picture_sets.PictureSet) -> list[str]:
  """Warns of samples in the order of their classes, of which a part has only a few."""
  classes = samples.classes
  if classes is None or len(classes) <= inception_score.PART:
    return []
  part, all_classes = (
    len(np.unique(found)) for found in (classes[: inception_score.PART], classes)
  )
  if 2 * part >= all_classes:
    return []
  return [
    f'Inception score: too low, since the first {inception_score.PART:,} samples show only {part:,} of '
    f'{all_classes:,} classes (arr_1); shuffle the samples.'
  ]


def _precision_recall(
  samples: feature_blocks.Store, reference: feature_blocks.Store
) -> tuple[dict[str, measurement.Value], list[str]]:
  pools = [np.concatenate(list(store.arrays('values'))) for store in (samples, reference)]
  least = min(map(len, pools))
  if least <= precision_recall.NEIGHBORS:
    return {}, [f'Precision, recall: left out, since there are only {least} pictures.']
  found = precision_recall.precision_recall(pools[0], pools[1])
  values = {
    name: measurement.Value(
      share,
      (share * (1 - share) / len(pool)) ** 0.5,
      f"{_OF_PICTURES}, given the other set's manifold",
    )
    for name, share, pool in (
      ('precision', found.precision, pools[0]),
      ('recall', found.recall, pools[1]),
    )
  }
  if least < _FEW_PICTURES:
    return values, [
      f'Precision, recall: unreliable for {least} pictures, since the balls around them are large.'
    ]
  return values, []


def skipped(place: str, found: Facts) -> list[str]:
  """Returns a remark on pictures that were left out, if there are any."""
  if not found.skipped:
    return []
  reasons = ', '.join(f'{count:,} {reason}' for reason, count in found.skipped.items())
  return [f'{place}: left out {reasons}.']


def _drawn_with(place: str) -> dict[str, Any]:
  """Returns the settings of `parti-jax evaluate --dataset=imagenet`, if it wrote the samples."""
  path = pathlib.Path(place)
  if path.name not in (class_samples.NPZ_FILE, class_samples.PNG_FOLDER):
    return {}
  try:
    found = storage.read_json(path.parent / output_folder.RUN_FILE)
  except (OSError, ValueError):
    return {}
  drawn = isinstance(found, dict) and {'model', 'seed', 'sampling'} <= found.keys()
  return {'drawn_with': found} if drawn else {}


def statistics_file(store: feature_blocks.Store, place: str) -> bytes:
  """Returns the statistics of pictures as an .npz, as ADM's evaluator reads it.

  Raises:
    UserError: there are fewer than two pictures.
  """
  arrays: dict[str, Any] = {}
  for name, (mean, covariance) in _STATISTICS.items():
    gaussian = gaussian_of(store.arrays(name), place)
    if gaussian is not None:
      arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def files(found: measurement.Measurement) -> dict[str, bytes]:
  """Returns the files of a measurement: {name: content}."""
  return {
    'measurement.json': found.json().encode(),
    'measurement.md': found.markdown().encode(),
  }


def write(folder: pathlib.Path, found: measurement.Measurement) -> Iterator[pathlib.Path]:
  """Writes the files of a measurement; yields their paths."""
  for name, content in files(found).items():
    output_folder.write(folder / name, content)
    yield folder / name
