"""Captions and pictures of a source, prepared for a model; our tasks by name.

| task | features | trains |
|---|---|---|
| `SOURCE_texts` | inputs | the text encoder, by masked language modeling |
| `SOURCE_images` | images | the image tokenizer |
| `SOURCE_pairs` | inputs, images | text encoder, ranker, super-resolution |
| `openmoji_tokens`, `cached_tokens` | inputs, targets | Parti, from the token cache |

SOURCE is openmoji, openmoji_scenes, folder, tfrecord, webdataset, parquet, hf_datasets, prepared or, for texts,
text. `texts`, `images` and `pairs` without a source use the one that gin chooses by `data.source`,
so a run changes its data by including another file of gin_configs/tasks/. Text tasks don't read the
pictures. `token_cache_NAME_tokens` is the token cache that gin configures in the scope
`token_cache_NAME`. gin files import this module to register all gin names of the data.

Features: 'inputs' int32 [text_length], token ids of the caption; 'images' uint8 [height, width, 3];
'targets' int32 [image_length], the codes of the image tokens in raster order. `tasks` provides the
same as seqio tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterable
from collections.abc import Iterator

import gin
import numpy as np
from absl import logging
from jaxtyping import UInt8

import parti_jax
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.core.fingerprints import Fingerprint
from parti_jax.data import captions
from parti_jax.data import examples
from parti_jax.data import image_decoding
from parti_jax.data import mixing
from parti_jax.data import share  # For its names in gin.  # noqa: F401
from parti_jax.data import sources
from parti_jax.data import tally
from parti_jax.data import text_features as text_features_lib
from parti_jax.data import text_tokenizer
from parti_jax.data import token_cache
from parti_jax.data.damage import Damaged
from parti_jax.data.damage import Unusable
from parti_jax.data.sources import base

TOKEN_TASKS = ('openmoji_tokens', 'cached_tokens')
# Kind of a task -> its features. A kind by itself is the task of the source that gin chooses.
_KINDS = {'images': ('images',), 'pairs': ('images', 'inputs'), 'texts': ('inputs',)}
ALIASES = tuple(_KINDS)
# Names of the vocabulary in an exported model and in an imported text encoder.
_IN_FOLDER = ('vocabulary.model', 'text_encoder_vocabulary.model')


@gin.configurable('vocabulary')
def get_vocabulary(path: str | None = None) -> text_tokenizer.TextTokenizer:
  """Returns the run's text vocabulary.

  Args:
    path: a SentencePiece model, a tokenizer.json, or the folder of an exported model or of an
      imported text encoder; a path or URL. None selects the vocabulary of the demo model.
  """
  demo = os.path.join(os.path.dirname(parti_jax.__file__), 'demo')
  return _load_vocabulary(path or demo)


@functools.cache
def _load_vocabulary(path: str) -> text_tokenizer.TextTokenizer:
  for name in _IN_FOLDER:
    if storage.exists(file := storage.join(path, name)):
      return text_tokenizer.open_tokenizer(file)
  return text_tokenizer.open_tokenizer(path)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A task's data.

  Attributes:
    name: name of the task, including its source.
    source: the examples.
    features: names of the features.
    vocabulary: vocabulary of the captions; None without captions.
  """

  name: str
  source: base.Source
  features: tuple[str, ...]
  vocabulary: text_tokenizer.TextTokenizer | None

  @property
  def sizes(self) -> dict[str, int]:
    """Returns {feature: number of ids}, for the features that have ids."""
    found = {}
    if self.vocabulary:
      found['inputs'] = self.vocabulary.size
    if 'targets' in self.features:
      found['targets'] = self.source.info['codebook_size']
    return found

  @property
  def fingerprints(self) -> dict[str, Fingerprint | None]:
    """Fingerprints of the captions' vocabulary and the tokens' tokenizer; None if unknown."""
    found = dict.fromkeys(('vocabulary', 'tokenizer'))
    if self.vocabulary:
      found['vocabulary'] = Fingerprint(
        self.vocabulary.fingerprint, f'vocabulary.path={self.vocabulary.path!r}'
      )
    if 'targets' in self.features:
      found['tokenizer'] = Fingerprint(self.source.info['tokenizer'], self.source.name)
    return found

  @property
  def grid(self) -> tuple[int, int] | None:
    """Rows and columns of a picture's image tokens; None if unknown, or without image tokens.

    A token cache that doesn't state them is of a time when all pictures were square.
    """
    if 'targets' not in self.features:
      return None
    tokens, found = self.source.info['image_tokens'], self.source.info.get('grid')
    if found is None:
      found = 2 * (math.isqrt(tokens),)
    return (found[0], found[1]) if math.prod(found) == tokens else None

  @property
  def text_features(self) -> text_features_lib.TextFeatures | None:
    """The text features of a token cache's examples; None without them."""
    return getattr(self.source, 'text_features', None)

  def open(self, split: str) -> base.Records | base.Shards:
    """Opens a split with `Source.open`, reading only what the features need."""
    return self.source.open(split, pictures=self.features != ('inputs',))

  def preparation(self, lengths: examples.Lengths, training: bool) -> examples.Preparation:
    """Returns the preparation of an example.

    Args:
      lengths: the length of each feature, such as {'inputs': 32, 'images': 64}. The length of a
        picture is its height and width in pixels; one number for squares.
      training: whether texts are dropped for guidance, and any of several captions is used. Tasks of texts only never drop them, since
        an encoder learns nothing from an empty text.

    Raises:
      UserError: the lengths don't fit the features, or text features are of other text tokens.
    """
    check_lengths(self.name, self.features, lengths)
    rate = examples.drop_rate() if self.vocabulary else 0.0
    if 'targets' in lengths:
      tokens = self.source.info['image_tokens']
      if lengths['targets'] != tokens:
        raise UserError(
          f'{self.source.name} has {tokens} tokens per picture, but '
          f"feature_lengths['targets'] = {lengths['targets']}"
        )
    if self.text_features is not None:
      assert self.vocabulary is not None
      self.text_features.check_texts(self.vocabulary, lengths['inputs'])
    return examples.Preparation(
      lengths.get('inputs'),
      lengths.get('images'),
      lengths.get('targets'),
      self.vocabulary,
      image_decoding.configured(),
      rate if training and self.features != ('inputs',) else 0.0,
      any_caption=training,
      text_features=self.text_features,
    )


def check_lengths(name: str, features: Iterable[str], lengths: examples.Lengths) -> None:
  """Raises UserError unless `lengths` has exactly the features of a task, each with a length."""
  if set(features) != set(lengths):
    raise UserError(
      f'{name} has the features {", ".join(sorted(features))}, but feature_lengths '
      f'gives {", ".join(sorted(lengths)) or "none"}{_hint(lengths)}'
    )
  for feature, length in lengths.items():
    numbers = image_sizes.sides(length) if feature == 'images' else (length,)
    if not all(isinstance(number, int) and number >= 1 for number in numbers):
      raise UserError(f'feature_lengths[{feature!r}] = {length!r} must be a positive whole number')


def _hint(lengths: examples.Lengths) -> str:
  kinds = _KINDS | {TOKEN_TASKS[-1]: ('inputs', 'targets')}
  fitting = [kind for kind, features in kinds.items() if set(features) == set(lengths)]
  return f"; a run that needs these has train.task = '{fitting[0]}'" if fitting else ''


def names() -> list[str]:
  """Returns the names of the tasks, without the `ALIASES`."""
  return [
    *(
      f'{source}_{kind}'
      for source in sources.NAMES
      for kind in _KINDS
      if source != 'text' or kind == 'texts'
    ),
    *TOKEN_TASKS,
  ]


def is_ours(name: str) -> bool:
  """Returns whether a task belongs to this module."""
  return _is_tokens(name) or split_name(name) is not None


def _is_tokens(name: str) -> bool:
  source, _, kind = name.rpartition('_')
  return name in TOKEN_TASKS or (kind == 'tokens' and mixing.is_token_cache(source))


def split_name(name: str) -> tuple[str, str] | None:
  """Splits 'folder_pairs' into source and kind; returns None for names of other tasks."""
  source, _, kind = name.rpartition('_')
  if kind not in _KINDS or (source and sources.kind(source) is None):
    return None
  return source or sources.chosen(), kind


def feature_names(name: str) -> tuple[str, ...]:
  """Returns the names of the features of a task of this module, in order."""
  return ('inputs', 'targets') if _is_tokens(name) else _KINDS[name.rpartition('_')[2]]


def get(name: str, image_size: image_sizes.ImageSize = 64) -> Dataset:
  """Returns the data of a task with gin's current configuration.

  Args:
    name: name of the task.
    image_size: the run's picture size in pixels, at which OpenMoji and its scenes are rendered.

  Raises:
    UserError: the task doesn't exist, or its data can't be found.
  """
  if _is_tokens(name):
    scope = None if name in TOKEN_TASKS else name.rpartition('_')[0]
    with gin.config_scope(scope):
      return Dataset(name, token_cache.configured(), ('inputs', 'targets'), get_vocabulary())
  found = split_name(name)
  if found is None:
    raise UserError(f'unknown task {name!r}; choose from {", ".join(names())}')
  source, kind = found
  features = _KINDS[kind]
  return Dataset(
    f'{source}_{kind}',
    sources.configured(source, image_size),
    features,
    get_vocabulary() if 'inputs' in features else None,
  )


def source_name(task_or_source: str | None = None) -> str:
  """Returns the source of a task or source name; None for the source that gin chooses."""
  if task_or_source is None:
    return sources.chosen()
  if sources.kind(task_or_source) and split_name(task_or_source) is None:
    return task_or_source
  if found := split_name(task_or_source):
    return found[0]
  raise UserError(
    f'{task_or_source!r} is not a source of pictures; choose from {", ".join(sources.NAMES)}'
  )


def pictures_and_captions(
  task_or_source: str | None, split: str, size: image_sizes.ImageSize
) -> Iterator[tuple[str, UInt8[np.ndarray, 'height width 3']]]:
  """Opens a split and yields its captions and pictures in order, once.

  Skips pictures that can't be decoded and examples without a caption; a warning at the end counts
  them.

  Args:
    task_or_source: 'openmoji', 'folder_pairs', 'pairs' ...; None for the source that gin chooses.
    split: the split.
    size: height and width in pixels; one number for squares.

  Yields:
    (caption, picture).

  Raises:
    UserError: immediately if the source can't be read, or at the end if no example was usable.
  """
  name = source_name(task_or_source)
  source = sources.configured(name, size)
  return _usable(source, split, source.examples(split), size, image_decoding.configured())


def _usable(
  source: base.Source,
  split: str,
  found: Iterator[base.Example | Damaged],
  size: image_sizes.ImageSize,
  decode: examples.Decode,
) -> Iterator[tuple[str, UInt8[np.ndarray, 'height width 3']]]:
  """Yields the usable examples of a split; implements `pictures_and_captions`."""
  skipped, shortened, count = tally.Tally(), tally.Tally(), 0
  for example in found:
    if isinstance(example, Damaged):
      skipped.add(example.reason, place=example.where)
      continue
    try:
      picture, notes = decode(example['picture'], size)
      caption, changes = captions.clean(captions.alternatives(example['caption'])[0])
    except Unusable as error:
      skipped.add(str(error))
      continue
    for change in notes + changes:
      shortened.add(change)
    count += 1
    yield caption, picture
  if not count:
    reasons = f'skipped {skipped}' if skipped.counts() else 'it is empty'
    raise UserError(f'{source.name} has no usable example in split {split!r}; {reasons}')
  if skipped.counts() or shortened.counts():
    logging.warning(
      '%s, %s: read %d; skipped: %s; kept in part: %s',
      source.name,
      split,
      count,
      str(skipped) or 'none',
      str(shortened) or 'none',
    )
