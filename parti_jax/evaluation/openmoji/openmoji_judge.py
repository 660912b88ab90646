"""Judges by its pixels alone whether a picture shows the requested emoji.

The judge compares a picture with all real OpenMoji pictures by the mean squared difference of
pixels. It answers two questions about a picture generated for a name and tones:

* tone right: among the real pictures of that name in all its tones (including the untoned yellow
  one), does the nearest one have the requested tones? Judged only for names with tones.
* name right: among the real pictures of all names in exactly those tones, does the nearest one have
  the requested name (top 1), or one of the five nearest (top 5)?

Several OpenMoji pictures are the same under two names ('artist', 'man artist'), or differ only in
the rounding of their edges. Such pictures count as one candidate that is right for each of its
names (and each of its tones). `Judge.duplicates` counts them.
"""

import collections
import dataclasses
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import Shaped
from jaxtyping import UInt8

from parti_jax.core import image_sizes
from parti_jax.data import openmoji

# Pictures converted to float32 at once, to bound the memory.
_BLOCK = 256
# Two real pictures are the same up to this mean squared difference, of values in [0, 255]. The
# smallest intended difference (a line of hair) is 0.29 at 64 pixels; rounding causes 0.01.
_SAME = 0.1


@dataclasses.dataclass(frozen=True)
class Verdicts:
  """The judge's verdicts on pictures generated for prompts.

  Attributes:
    tone_judged: whether the requested name has tones.
    tone_right: whether the tones are right; False where tone_judged is False.
    name_top1: whether the nearest picture has the requested name.
    name_top5: whether one of the five nearest has it.
  """

  tone_judged: Bool[np.ndarray, 'prompts']
  tone_right: Bool[np.ndarray, 'prompts num_images']
  name_top1: Bool[np.ndarray, 'prompts num_images']
  name_top5: Bool[np.ndarray, 'prompts num_images']


@dataclasses.dataclass(frozen=True)
class Duplicates:
  """Counts of real pictures that are the same as another one, at the judge's size.

  Attributes:
    pictures: number of real pictures.
    same_tone: pictures identical to one of another name in the same tones.
    same_name: pictures identical to one of the same name in other tones.
  """

  pictures: int
  same_tone: int
  same_name: int


def _merge_same(
  images: UInt8[np.ndarray, 'pictures height width 3'],
) -> UInt8[np.ndarray, 'pictures values']:
  """Replaces pictures that are the same by the first of them, so that they are equal."""
  merged = images.reshape(len(images), -1).copy()
  # Row means differ at most as much as the pixels, and are fast to compare.
  means = images.mean(axis=2, dtype=np.float32).reshape(len(images), -1)
  limit = 2 * _SAME * means.shape[1]  # Twice, for the rounding of float32.
  for start in range(0, len(images), _BLOCK):
    near = _squared_distances(means[start : start + _BLOCK], means) <= limit
    for offset, other in np.argwhere(near):
      index = start + offset
      if other < index:
        difference = images[index].reshape(-1).astype(np.float32) - merged[other]
        if np.square(difference).mean() <= _SAME:
          merged[index] = merged[other]
  return merged


class _Candidates:
  """Distinct pictures, each with the labels (names or tones) that it represents."""

  def __init__(self, pixels: UInt8[np.ndarray, 'pictures values'], labels: Sequence[Hashable]):
    """Stores the distinct pictures; `labels` has a label for each picture."""
    row_of: dict[bytes, int] = {}
    self._rows_of_label: dict[Hashable, list[int]] = collections.defaultdict(list)
    kept: list[int] = []
    for index, label in enumerate(labels):
      key = pixels[index].tobytes()
      if key not in row_of:
        row_of[key] = len(kept)
        kept.append(index)
      self._rows_of_label[label].append(row_of[key])
    self._pixels = pixels[kept]

  def rank(
    self, images: UInt8[np.ndarray, 'images values'], requested: Sequence[Hashable]
  ) -> Int[np.ndarray, 'images']:
    """Counts the candidates that are nearer to an image than those of its requested label.

    Args:
      images: the images.
      requested: a label for each image.

    Returns:
      The counts; 0 if the nearest candidate has the requested label.
    """
    ranks = []
    for start in range(0, len(images), _BLOCK):
      block = slice(start, start + _BLOCK)
      distances = _squared_distances(images[block], self._pixels)
      own = np.array(
        [row[self._rows_of_label[label]].min() for row, label in zip(distances, requested[block])]
      )
      ranks.append((distances < own[:, None]).sum(axis=1))
    return np.concatenate(ranks) if ranks else np.zeros(0, int)


def _squared_distances(
  images: Shaped[np.ndarray, 'images values'], candidates: Shaped[np.ndarray, 'candidates values']
) -> Float32[np.ndarray, 'images candidates']:
  """Returns the summed squared differences of rows of values in [0, 255].

  They are exact to about a millionth of the pictures' squared norms.
  """
  ink = _ink(images)
  norms = np.einsum('iv,iv->i', ink, ink)
  distances = np.empty((len(images), len(candidates)), np.float32)
  for start in range(0, len(candidates), _BLOCK):
    block = _ink(candidates[start : start + _BLOCK])
    distances[:, start : start + _BLOCK] = (
      norms[:, None] - 2 * ink @ block.T + np.einsum('cv,cv->c', block, block)
    )
  return distances


def _ink(values: Shaped[np.ndarray, '*shape']) -> Float32[np.ndarray, '*shape']:
  """Maps white, which fills most of the pictures, to 0: small norms keep float32 accurate."""
  return 255 - values.astype(np.float32)


class Judge:
  """Judges pictures against the real OpenMoji pictures.

  Attributes:
    pictures: the real pictures, in the order given.
    images: the same pictures, rendered on white.
    size: height and width in pixels.
  """

  def __init__(
    self,
    pictures: Sequence,
    size: image_sizes.ImageSize,
    render: Callable[[str, int], UInt8[np.ndarray, 'size size 3']] | None = None,
  ):
    """Renders each real picture once.

    Args:
      pictures: objects with `code`, `name` and `tones` (`openmoji.Picture`).
      size: height and width in pixels.
      render: renders a code at a size; `openmoji.render` if None.

    Raises:
      ValueError: there are no pictures, or one was rendered at another size.
      UserError: the size isn't square.
    """
    if not pictures:
      raise ValueError('a judge needs at least one real picture')
    render = render or openmoji.render
    size = image_sizes.square(size, 'the judge of OpenMoji compares')
    self.pictures = list(pictures)
    self.size = size
    self.images = np.stack([render(picture.code, size) for picture in self.pictures])
    if self.images.shape[1:] != (size, size, 3):
      raise ValueError(f'real pictures are {self.images.shape[1:]}, not {(size, size, 3)}')
    self._pixels = _merge_same(self.images)
    self._of_tones = collections.defaultdict(list)
    self._of_name = collections.defaultdict(list)
    self._index_of_code = {}
    for index, picture in enumerate(self.pictures):
      self._of_tones[picture.tones].append(index)
      self._of_name[picture.name].append(index)
      self._index_of_code[picture.code] = index

  def real(self, pictures: Sequence) -> UInt8[np.ndarray, 'pictures size size 3']:
    """Returns the real images of some of the judge's pictures."""
    indices = [self._index_of_code[picture.code] for picture in pictures]
    return self.images[np.array(indices, int)]

  def has_tones(self, name: str) -> bool:
    """Returns whether real pictures of a name come in more than one set of tones."""
    return len({self.pictures[i].tones for i in self._of_name[name]}) > 1

  def judge(
    self, asked: Sequence, images: UInt8[np.ndarray, 'prompts num_images size size 3']
  ) -> Verdicts:
    """Judges images generated for the names and tones of real pictures.

    Args:
      asked: real pictures (`name` and `tones` are read), one for each prompt.
      images: the images generated for each prompt.

    Returns:
      Verdicts on each image.

    Raises:
      ValueError: `images` has another shape or type, or no real picture has a requested name in
        its tones.
    """
    images = np.asarray(images)
    wanted = (len(asked), self.size, self.size, 3)
    if images.ndim != 5 or images.shape[:1] + images.shape[2:] != wanted:
      raise ValueError(
        f'images are {images.shape}, not (prompts, num_images, height, width, 3) with {wanted}'
      )
    if images.dtype != np.uint8:
      raise ValueError(f'images are {images.dtype}, not uint8')
    for picture in asked:
      if all(self.pictures[i].tones != picture.tones for i in self._of_name[picture.name]):
        raise ValueError(f'no real picture of {picture.name!r} in the tones {picture.tones}')
    flat = images.reshape(*images.shape[:2], self._pixels.shape[1])
    names = [picture.name for picture in asked]
    tones = [picture.tones for picture in asked]
    name_rank = self._ranks(
      flat,
      groups=tones,
      labels=names,
      members=self._of_tones,
      label_of=lambda picture: picture.name,
    )
    tone_rank = self._ranks(
      flat,
      groups=names,
      labels=tones,
      members=self._of_name,
      label_of=lambda picture: picture.tones,
    )
    tone_judged = np.array([self.has_tones(name) for name in names], bool)
    return Verdicts(
      tone_judged=tone_judged,
      tone_right=(tone_rank == 0) & tone_judged[:, None],
      name_top1=name_rank == 0,
      name_top5=name_rank < 5,
    )

  def _ranks(
    self,
    flat: UInt8[np.ndarray, 'prompts num_images values'],
    groups: Sequence[Hashable],
    labels: Sequence[Hashable],
    members: Mapping[Any, Sequence[int]],
    label_of: Callable[[Any], Hashable],
  ) -> Int[np.ndarray, 'prompts num_images']:
    """Ranks the requested label of each image among the real pictures of its prompt's group.

    Args:
      flat: the images of each prompt.
      groups: for each prompt, the key of its candidates in `members`.
      labels: for each prompt, the right label.
      members: key of a group -> indices of its real pictures.
      label_of: real picture -> label.

    Returns:
      The ranks; 0 if the nearest real picture is right.
    """
    prompts_of = collections.defaultdict(list)
    for prompt, group in enumerate(groups):
      prompts_of[group].append(prompt)
    num_images = flat.shape[1]
    ranks = np.zeros(flat.shape[:2], int)
    for group, prompts in prompts_of.items():
      indices = members[group]
      candidates = _Candidates(self._pixels[indices], [label_of(self.pictures[i]) for i in indices])
      requested = [labels[prompt] for prompt in prompts for _ in range(num_images)]
      images = flat[prompts].reshape(len(requested), -1)
      ranks[prompts] = candidates.rank(images, requested).reshape(len(prompts), num_images)
    return ranks

  def duplicates(self) -> Duplicates:
    """Counts the real pictures that represent more than one name, or more than one tone."""
    return Duplicates(
      pictures=len(self.pictures),
      same_tone=self._shared(self._of_tones, lambda picture: picture.name),
      same_name=self._shared(self._of_name, lambda picture: picture.tones),
    )

  def _shared(self, members, label_of) -> int:
    """Counts pictures that are identical to one with another label in their group."""
    count = 0
    for indices in members.values():
      labels_of_pixels = collections.defaultdict(list)
      for index in indices:
        labels_of_pixels[self._pixels[index].tobytes()].append(label_of(self.pictures[index]))
      count += sum(len(labels) for labels in labels_of_pixels.values() if len(set(labels)) > 1)
    return count
