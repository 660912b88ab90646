"""The settings of `parti-jax prepare`, configured in gin."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import unicodedata
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any

import gin

from parti_jax.core import checks
from parti_jax.core.errors import UserError

# Name in gin -> Pillow's name.
FORMATS = {'jpeg': 'JPEG', 'webp': 'WEBP', 'png': 'PNG'}
DUPLICATES = ('picture', 'picture_and_caption')


@gin.configurable('prepare')
@checks.bounded(
  size=(2, 8192),
  quality=(1, 100),
  min_side=(1, None),
  max_aspect_ratio=(1, None),
  caption_length=(1, None),
  caption_words=(1, None),
  min_script_share=(0, 1),
  near_duplicates=(0, 15),
  min_similarity=(-1, 1),
  examples_per_shard=(1, 2**20),
  files_per_shard=(1, 2**20),
)
@dataclasses.dataclass(frozen=True)
class Settings:
  """Filters and output format of prepared pictures; None disables a filter or a step.

  Attributes:
    size: pixels of the shorter side after resizing.
    enlarge: whether smaller pictures are enlarged to `size`.
    image_format: 'jpeg', 'webp' or 'png'.
    quality: quality of JPEG and WebP, 1 to 100.
    pass_through: whether a picture that needs no change keeps its bytes: one in `image_format`, not
      larger than `size`, upright and without a color profile.
    min_side: minimum pixels of the shorter side before resizing.
    max_aspect_ratio: maximum ratio of the longer side to the shorter one.
    caption_length: minimum and maximum characters of a caption.
    caption_words: minimum and maximum words of a caption, separated by whitespace.
    scripts: scripts allowed for letters of a caption, given as the first word of their Unicode
      names: 'LATIN', 'CYRILLIC', 'CJK', 'HIRAGANA', 'ARABIC' and so on.
    min_script_share: minimum share of a caption's letters in these scripts.
    columns: bounds of columns, such as {'similarity': (0.3, None), 'pwatermark': (None, 0.5)}, or
      allowed strings, such as {'NSFW': ('UNLIKELY', 'UNSURE')}. An example without the column is
      dropped.
    ranker: folder of a CLIP or SigLIP 2 that `parti-jax import ranker` wrote; a path or a URL.
    min_similarity: minimum cosine of the ranker's vectors of the picture, as it is written, and of
      the caption.
    keep_columns: columns to write with an example; None for all.
    duplicates: 'picture' keeps one of the pictures with the same bytes; 'picture_and_caption' does
      so only if the captions are the same too.
    near_duplicates: keeps the largest of the pictures whose perceptual hashes differ in at most
      this many of 63 bits. With 0, hashes must be equal, which takes the least time.
    examples_per_shard: examples read for one shard, from sources with an index.
    files_per_shard: files read for one shard, from sources of files such as tars.
  """

  size: int | None = None
  enlarge: bool = False
  image_format: str = 'jpeg'
  quality: int = 95
  pass_through: bool = True
  min_side: int | None = None
  max_aspect_ratio: float | None = None
  caption_length: tuple[int, int] | None = None
  caption_words: tuple[int, int] | None = None
  scripts: tuple[str, ...] | None = None
  min_script_share: float = 1.0
  columns: Mapping = dataclasses.field(default_factory=dict)
  ranker: str | None = None
  min_similarity: float | None = None
  keep_columns: tuple[str, ...] | None = None
  duplicates: str | None = 'picture'
  near_duplicates: int | None = None
  examples_per_shard: int = 2048
  files_per_shard: int = 1

  def __post_init__(self):
    checks.check_fields(self, 'prepare.', checks.bounds_of(Settings))
    _check_choice('image_format', self.image_format, FORMATS)
    if self.duplicates is not None:
      _check_choice('duplicates', self.duplicates, DUPLICATES)
    for name in ('caption_length', 'caption_words'):
      value = getattr(self, name)
      if value is not None and value[0] > value[1]:
        raise UserError(f'prepare.{name}={value} must be (least, most)')
    if (self.ranker is None) != (self.min_similarity is None):
      raise UserError(
        f'prepare.ranker={self.ranker!r} and prepare.min_similarity={self.min_similarity} belong '
        'together; set both, or none'
      )
    if self.enlarge and self.size is None:
      raise UserError('prepare.enlarge=True needs prepare.size')
    for script in self.scripts or ():
      if script not in known_scripts():
        raise UserError(
          f"prepare.scripts: {script!r} is not the first word of a letter's Unicode "
          'name; some are LATIN, CYRILLIC, GREEK, ARABIC, CJK, HIRAGANA and HANGUL'
        )
    if self.scripts == ():
      raise UserError(
        'prepare.scripts=() would drop all captions with letters; None allows all scripts'
      )
    if not isinstance(self.columns, Mapping):
      raise UserError(
        f'prepare.columns={checks.shown(self.columns)} must be of the form '
        "{'similarity': (0.3, None)}"
      )
    for name, wanted in self.columns.items():
      _check_column(name, wanted)

  @property
  def drops_duplicates(self) -> bool:
    """Whether duplicates are dropped, so examples are compared with one another."""
    return self.duplicates is not None or self.near_duplicates is not None


def is_texts(wanted: tuple | list) -> bool:
  """Returns whether a value of `Settings.columns` lists strings; otherwise it holds bounds."""
  return all(isinstance(item, str) for item in wanted)


@functools.cache
def known_scripts() -> frozenset[str]:
  """Returns the first words of the Unicode names of all letters."""
  return frozenset(
    script_of(character)
    for character in map(chr, range(sys.maxunicode + 1))
    if is_letter(character)
  )


def script_of(letter: str) -> str:
  """Returns the first word of a letter's Unicode name; '' if it has none."""
  return unicodedata.name(letter, '').partition(' ')[0]


def is_letter(character: str) -> bool:
  """Returns whether a character is a letter; excludes modifiers, which several scripts share."""
  return unicodedata.category(character) in ('Lu', 'Ll', 'Lt', 'Lo')


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
  if value not in choices:
    raise UserError(f'prepare.{name}={value!r} is not one of {", ".join(choices)}')


def _check_column(name: Any, wanted: Any) -> None:
  if isinstance(name, str) and isinstance(wanted, (tuple, list)) and len(wanted):
    if is_texts(wanted):
      return
    bounds = [bound for bound in wanted if bound is not None]
    if (
      len(wanted) == 2
      and bounds
      and all(type(bound) in (int, float) and math.isfinite(bound) for bound in bounds)
      and (bounds == sorted(bounds))
    ):
      return
  raise UserError(
    f'prepare.columns: {checks.shown(name)}: {checks.shown(wanted)} must be bounds '
    "such as (0.3, None), the lower one first, or strings such as ('UNLIKELY',)"
  )
