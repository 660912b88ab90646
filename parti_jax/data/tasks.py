"""seqio tasks: captions and pictures from a source, ready for a model.

| task | features before the converter | trains |
|---|---|---|
| `SOURCE_texts` | inputs | the text encoder, by masked language modelling |
| `SOURCE_images` | images | the image tokenizer |
| `SOURCE_pairs` | inputs, images | text encoder, ranker, super-resolution, an uncached generator |
| `openmoji_tokens`, `cached_tokens` | inputs, targets | Parti, from the token cache |

SOURCE is openmoji, folder, tfrecord, webdataset or, for texts, text. `texts`, `images` and `pairs`
alone mean the source that gin chooses by `data.source`, so that a run takes its data from another
place when it includes another file of gin_configs/tasks/. Texts are read without their pictures.

Features: 'inputs' int32 [text_length], token ids of the caption; 'images' uint8 [size, size, 3];
'targets' int32 [image_length], the codes of the image tokens in raster order.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import gin
import numpy as np
from absl import logging

import parti_jax
from parti_jax import fingerprints
from parti_jax.data import (
    captions, decoding, example_files, preprocessors, sources, streams, tally, token_cache)
from parti_jax.data.quiet_tensorflow import seqio, tf
from parti_jax.data.vocabulary import EOS_ID, TextVocabulary
from parti_jax.errors import UserError

TOKEN_TASKS = ('openmoji_tokens', 'cached_tokens')
# Kind of a task -> its features. A kind alone is the task of the source that gin chooses.
_KINDS = {'images': ('images',), 'pairs': ('images', 'inputs'), 'texts': ('inputs',)}
ALIASES = tuple(_KINDS)


class Task(seqio.Task):
  """A seqio task that is shuffled again in each epoch, however small its source is."""

  def get_dataset(
      self,
      sequence_length: Mapping[str, int] | None = None,
      split: str = 'train',
      use_cached: bool = False,
      shuffle: bool = True,
      shuffle_buffer_size: int | None = None,
      seed: int | None = None,
      shard_info: seqio.ShardInfo | None = None,
      num_epochs: int | None = 1,
      trim_output_features: bool = True,
      try_in_mem_cache: bool = False,
  ) -> tf.data.Dataset:
    """Reads a split; arguments as those of `seqio.Task.get_dataset`.

    `try_in_mem_cache` has no effect: seqio's cache would repeat the order of the first epoch.
    """
    del try_in_mem_cache
    return super().get_dataset(
        sequence_length, split, use_cached=use_cached, shuffle=shuffle,
        shuffle_buffer_size=shuffle_buffer_size, seed=seed, shard_info=shard_info,
        num_epochs=num_epochs, trim_output_features=trim_output_features, try_in_mem_cache=False)


@gin.configurable('vocabulary')
def get_vocabulary(path: str | None = None) -> TextVocabulary:
  """Returns the text vocabulary of the run; None is the one that comes with the demo model."""
  demo = os.path.join(os.path.dirname(parti_jax.__file__), 'demo', 'vocabulary.model')
  return _load_vocabulary(path or demo)


@functools.cache
def _load_vocabulary(path: str) -> TextVocabulary:
  return TextVocabulary(path)


def vocabulary_fingerprint(
    task: seqio.Task | seqio.Mixture) -> fingerprints.Fingerprint | None:
  """Returns the fingerprint of a task's text vocabulary; None where there is none that is known."""
  if 'inputs' not in task.output_features:
    return None
  found = task.output_features['inputs'].vocabulary
  if isinstance(found, seqio.SentencePieceVocabulary):
    with tf.io.gfile.GFile(found.sentencepiece_model_file, 'rb') as file:
      value = fingerprints.of_vocabulary(file.read())
    return fingerprints.Fingerprint(value, f'the task {task.name}')
  if not (isinstance(found, seqio.PassThroughVocabulary) and _is_ours(task.name)):
    return None
  vocabulary = get_vocabulary()
  return fingerprints.Fingerprint(vocabulary.fingerprint, f'vocabulary.path={vocabulary.path!r}')


def tokenizer_fingerprint(
    task: seqio.Task | seqio.Mixture) -> fingerprints.Fingerprint | None:
  """Returns the fingerprint of the tokenizer that made a task's tokens; None if it is not known."""
  value = getattr(getattr(task, 'source', None), 'info', {}).get('tokenizer')
  return value and fingerprints.Fingerprint(value, task.source.name)


def caption_decoder(task: seqio.Task | seqio.Mixture) -> Callable[[Sequence[int]], str]:
  """Returns what turns ids of a task's feature 'inputs' into text."""
  if _is_ours(task.name):
    return get_vocabulary().decode
  return task.output_features['inputs'].vocabulary.decode


def numbers_examples(task: seqio.Task | seqio.Mixture) -> bool:
  """Whether a task gives its examples numbers, in order; see `preprocessors.number`."""
  return isinstance(task, seqio.Task) and _is_ours(task.name)


def _is_ours(name: str) -> bool:
  return name in TOKEN_TASKS or _split_name(name) is not None


def names() -> list[str]:
  """Returns the names of this module's tasks, without the `ALIASES`."""
  return [*(f'{source}_{kind}' for source in sources.NAMES for kind in _KINDS
            if source != 'text' or kind == 'texts'), *TOKEN_TASKS]


def feature_names(name: str) -> tuple[str, ...]:
  """Returns the names of the features of a task of this module, in order."""
  return ('inputs', 'targets') if name in TOKEN_TASKS else _KINDS[name.rpartition('_')[2]]


def get_task(name: str, image_size: int = 64) -> seqio.Task | seqio.Mixture:
  """Returns a task as gin configures it now, and registers it with seqio under its name.

  Tasks of this module are made anew at each call, since the registry is older than gin's files.

  Args:
    name: a task of this module (see above), or any task or mixture in seqio's registry.
    image_size: the run's picture size in pixels, at which OpenMoji is drawn.

  Returns:
    The task or mixture.

  Raises:
    UserError: there is no such task, or its data can't be found.
  """
  if not _is_ours(name):
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
      return seqio.get_mixture_or_task(name)
    raise UserError(f'unknown task {name!r}; there are {", ".join(names())}')
  task = make_task(name, image_size)
  if task.name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(task.name)
  seqio.TaskRegistry.add_provider(task.name, task)
  return task


def make_task(name: str, image_size: int = 64, keep_captions: bool = False) -> Task:
  """Returns a task of this module as gin configures it now; the registry knows nothing of it.

  Args:
    name: of the task.
    image_size: as in `get_task`.
    keep_captions: whether examples keep the text of 'inputs' beside it as 'inputs_pretokenized',
      tf.string [], by which seqio's and t5x's outputs name an example.

  Raises:
    UserError: its data can't be found.
  """
  if name in TOKEN_TASKS:
    return _tokens_task(name, keep_captions)
  source, kind = _split_name(name)
  if kind == 'texts':
    return _texts_task(source, keep_captions)
  return _pictures_task(source, kind, image_size, keep_captions)


def _split_name(name: str) -> tuple[str, str] | None:
  """Splits 'folder_pairs' into source and kind; None for the names of other tasks."""
  source, _, kind = name.rpartition('_')
  if kind not in _KINDS or (source and source not in sources.NAMES):
    return None
  return source or sources.chosen(), kind


def _pictures_task(
    source_name: str, kind: str, image_size: int, keep_captions: bool
) -> Task:
  source = sources.configured(source_name, image_size)
  features = {'images': _feature(size=256, dtype=tf.uint8, rank=3)}
  steps = [preprocessors.number, preprocessors.leave_out, preprocessors.decode_images]
  if kind == 'pairs':
    vocabulary = get_vocabulary()
    features['inputs'] = text_feature(vocabulary)
    steps[2:2] = _text_steps(vocabulary, keep_captions)
  return Task(
      f'{source_name}_{kind}', source, features, steps, shuffle_buffer_size=None
  )


class _Texts(seqio.DataSource):
  """The captions of a source without its pictures, as `sources.PictureSource.texts` gives them."""

  def __init__(self, source: sources.PictureSource):
    super().__init__(
        splits=source.splits, caching_permitted=False, performs_internal_shuffling=True)
    self._source, self.place = source, source.place

  @property
  def supports_arbitrary_sharding(self):
    return self._source.supports_arbitrary_sharding

  def list_shards(self, split):
    """Returns the names of the parts in which a split lies."""
    return self._source.list_shards(split)

  def num_input_examples(self, split):
    """Returns the number of captions in a split, None where it takes reading them all."""
    return self._source.num_texts(split)

  def get_dataset(
      self, split='train', shuffle=True, seed=None, shard_info=None, **unused_seqio_arguments
  ):
    """Reads a split; see `sources.PictureSource.texts`."""
    return self._source.texts(split, shuffle, seed, shard_info)


def _texts_task(source_name: str, keep_captions: bool) -> Task:
  vocabulary = get_vocabulary()
  steps = [preprocessors.number, preprocessors.leave_out,
           _text_steps(vocabulary, keep_captions)[0]]
  # Texts are never dropped here: an empty one teaches an encoder nothing.
  return Task(
      f'{source_name}_texts', _Texts(sources.configured(source_name)),
      {'inputs': text_feature(vocabulary)}, steps,
      shuffle_buffer_size=None,
  )


def _tokens_task(name: str, keep_captions: bool) -> Task:
  source = token_cache.configured_source()
  vocabulary = get_vocabulary()
  features = {
      'inputs': text_feature(vocabulary),
      'targets': token_feature(source),
  }
  steps = [preprocessors.number, preprocessors.leave_out, *_text_steps(vocabulary, keep_captions)]
  return Task(name, source, features, steps, shuffle_buffer_size=None)


def _text_steps(vocabulary: TextVocabulary, keep_captions: bool) -> list:
  return [
      functools.partial(
          preprocessors.tokenize_captions, vocabulary=vocabulary, keep=keep_captions),
      functools.partial(preprocessors.drop_text, vocabulary=vocabulary),
  ]


def text_feature(vocabulary: TextVocabulary) -> seqio.Feature:
  """Returns the feature 'inputs' of ids of a vocabulary."""
  return _feature(vocabulary.size, eos_id=EOS_ID)


def token_feature(source: token_cache.TokenCacheSource) -> seqio.Feature:
  """Returns the feature 'targets' of the image tokens of a token cache."""
  return _feature(source.info['codebook_size'])


def _feature(size: int, eos_id: int | None = None, **kwargs) -> seqio.Feature:
  # The preprocessors have made ids already; seqio only needs to know their range.
  vocabulary = seqio.PassThroughVocabulary(size, eos_id=eos_id)
  return seqio.Feature(vocabulary, add_eos=False, **kwargs)


def place(task: seqio.Task | seqio.Mixture) -> str:
  """Names the place that a task reads from."""
  source = getattr(task, 'source', None)
  return getattr(source, 'place', getattr(source, 'name', task.name))


def check_lengths(task: seqio.Task | seqio.Mixture, lengths: Mapping[str, int]) -> None:
  """Raises UserError unless there is a length for each of a task's features, and of its tokens."""
  wanted, given = sorted(task.output_features), sorted(lengths)
  if wanted != given:
    raise UserError(
        f'{task.name} has the features {", ".join(wanted)}, but feature_lengths gives '
        f'{", ".join(given) or "none"}'
    )
  for name, length in lengths.items():
    if not isinstance(length, int) or length < 1:
      raise UserError(f'feature_lengths[{name!r}] = {length!r} must be a whole number from 1')
  info = getattr(getattr(task, 'source', None), 'info', None)
  if info and lengths.get('targets') != info['image_tokens']:
    raise UserError(
        f'{task.source.name} has {info["image_tokens"]} tokens a picture, but '
        f"feature_lengths['targets'] = {lengths['targets']}"
    )


def source_name(task_or_source: str | None = None) -> str:
  """Returns the source behind a task's or source's name; None is the one that gin chooses."""
  if task_or_source is None:
    return sources.chosen()
  if task_or_source in sources.NAMES:
    return task_or_source
  if split := _split_name(task_or_source):
    return split[0]
  raise UserError(f'{task_or_source!r} is no source of pictures: {", ".join(sources.NAMES)}')


def pictures_and_captions(
    task_or_source: str | None, split: str, size: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Opens a split and yields its captions and pictures in order, once.

  Pictures that can't be decoded and examples without a caption are left out; a warning at the end
  counts them.

  Args:
    task_or_source: 'openmoji', 'folder_pairs', 'pairs' ...; None for the source that gin chooses.
    split: the split.
    size: height and width in pixels.

  Yields:
    (caption, picture uint8 [size, size, 3]).

  Raises:
    UserError: the source can't be read, at once; or it has no usable example, at the end.
  """
  name = source_name(task_or_source)
  reading = tally.Reading()
  with tally.reading(reading):
    dataset = sources.configured(name, size).get_dataset(split, shuffle=False)
  return _usable(dataset, name, split, size, reading, decoding.configured())


def _usable(dataset: tf.data.Dataset, name: str, split: str, size: int,
            reading: tally.Reading, decode: Callable) -> Iterator[tuple[str, np.ndarray]]:
  """Yields what can be used of an opened split; see `pictures_and_captions`."""
  count = 0
  with streams.Stream(dataset.prefetch(64)) as examples:
    for example in examples:
      try:
        if example['problem']:
          reason, place = example_files.parts(example['problem'])
          reading.skipped.add(reason, place=place)
          continue
        picture, notes = decode(example['picture'], size)
        caption, changes = captions.clean(example['caption'])
      except (decoding.UndecodablePicture, captions.UnusableCaption) as error:
        reading.skipped.add(str(error))
        continue
      for change in notes + changes:
        reading.shortened.add(change)
      count += 1
      yield caption, picture
  if not count:
    skipped = str(reading.skipped)
    reasons = f'skipped {skipped}' if skipped else 'there is none at all'
    raise UserError(f'{name} has no usable example in split {split!r}; {reasons}')
  if reading.skipped.counts() or reading.shortened.counts():
    logging.warning('%s, %s: read %d; skipped: %s; kept in part: %s', name, split, count,
                    str(reading.skipped) or 'none', str(reading.shortened) or 'none')
