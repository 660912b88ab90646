"""The data of `datasets` and `mixtures` as seqio tasks and mixtures, for t5x and other users.

Names, features, sources and steps are the same.
"""

from __future__ import annotations

import fractions
import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from parti_jax.core import fingerprints
from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import mixing
from parti_jax.data import mixtures
from parti_jax.data import preprocessors
from parti_jax.data import text_features
from parti_jax.data import text_tokenizer
from parti_jax.data import vocabulary as vocabulary_lib
from parti_jax.data.datasets import get_vocabulary
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.quiet_tensorflow import tf
from parti_jax.data.seqio_source import SeqioSource
from parti_jax.data.sources import base

# Turns passed from Python to TensorFlow at once.
_TURNS = 256


class Task(seqio.Task):
  """A seqio task that is reshuffled in each epoch, even if its source is small."""

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
    """Reads a split; the arguments are those of `seqio.Task.get_dataset`.

    `try_in_mem_cache` has no effect: seqio's cache would repeat the order of the first epoch.
    """
    del try_in_mem_cache
    return super().get_dataset(
      sequence_length,
      split,
      use_cached=use_cached,
      shuffle=shuffle,
      shuffle_buffer_size=shuffle_buffer_size,
      seed=seed,
      shard_info=shard_info,
      num_epochs=num_epochs,
      trim_output_features=trim_output_features,
      try_in_mem_cache=False,
    )


class Mixture(seqio.Mixture):
  """A seqio mixture that interleaves its tasks like our own mixtures, by `mixing.Turns`.

  With a finite number of epochs, it reads all examples of each task.

  Args:
    name: name of the mixture.
    tasks: pairs of a task of this module and its rate.
  """

  def __init__(self, name: str, tasks: Sequence[tuple[seqio.Task, float]]):
    super().__init__(name, tasks, sample_fn=take_turns)

  def get_dataset(
    self, sequence_length: Mapping[str, int] | None = None, split: str = 'train', *args, **kwargs
  ) -> tf.data.Dataset:
    """Reads a split; the arguments are those of `seqio.Mixture.get_dataset`.

    Raises:
      UserError: a source doesn't have the split, or can't be read.
    """
    for task in self.tasks:
      with mixtures.naming(task.name):
        task.source.source.check_split(split)
    return super().get_dataset(sequence_length, split, *args, **kwargs)

  def get_task_dataset(
    self,
    task: seqio.Task,
    output_feature_keys,
    sequence_length=None,
    split='train',
    use_cached=False,
    shuffle=True,
    seed=None,
    *args,
    **kwargs,
  ) -> tf.data.Dataset:
    """Reads a split of one task, with a separate seed; the arguments are those of seqio."""
    if seed is not None:
      seed = mixtures.part_seed(int(seed), task.name) >> 2  # In the range of seqio's int32 seeds.
    return super().get_task_dataset(
      task, output_feature_keys, sequence_length, split, use_cached, shuffle, seed, *args, **kwargs
    )


def take_turns(
  parts: Sequence[tf.data.Dataset], rates: Sequence[float], seed: int | None
) -> tf.data.Dataset:
  """Interleaves datasets so that each has its share of the examples over any stretch.

  Args:
    parts: the datasets.
    rates: the share of each; only ratios matter.
    seed: ignored.
  """
  del seed
  exact = [fractions.Fraction(repr(float(rate))) for rate in rates]

  def turns() -> Iterator[np.ndarray]:
    schedule = mixing.Turns([rate / sum(exact) for rate in exact])
    while True:
      yield np.array([schedule.next() for _ in range(_TURNS)], np.int64)

  order = tf.data.Dataset.from_generator(
    turns, output_signature=tf.TensorSpec([_TURNS], tf.int64)
  ).unbatch()
  return tf.data.Dataset.choose_from_datasets(list(parts), order, stop_on_empty_dataset=False)


def vocabulary_fingerprint(task: seqio.Task | seqio.Mixture) -> fingerprints.Fingerprint | None:
  """Returns the fingerprint of a task's text vocabulary; None if it has no known one."""
  if 'inputs' not in task.output_features:
    return None
  found = task.output_features['inputs'].vocabulary
  if isinstance(found, seqio.SentencePieceVocabulary):
    with tf.io.gfile.GFile(found.sentencepiece_model_file, 'rb') as file:
      value = fingerprints.of_vocabulary(file.read())
    return fingerprints.Fingerprint(value, f'the task {task.name}')
  if not (isinstance(found, seqio.PassThroughVocabulary) and datasets.is_ours(task.name)):
    return None
  vocabulary = get_vocabulary()
  return fingerprints.Fingerprint(vocabulary.fingerprint, f'vocabulary.path={vocabulary.path!r}')


def tokenizer_fingerprint(task: seqio.Task | seqio.Mixture) -> fingerprints.Fingerprint | None:
  """Returns the fingerprint of the tokenizer that made a task's tokens; None if unknown."""
  source = _source(task)
  if source is None or 'tokenizer' not in source.info:
    return None
  return fingerprints.Fingerprint(source.info['tokenizer'], source.name)


def _source(task: seqio.Task | seqio.Mixture) -> base.Source | None:
  """Returns the source of a task of this module; None for other tasks and for mixtures."""
  opened = getattr(task, 'source', None)
  return opened.source if isinstance(opened, SeqioSource) else None


def caption_decoder(task: str) -> Callable[[Sequence[int]], str]:
  """Returns a function that decodes ids of a task's feature 'inputs' to text."""
  if datasets.is_ours(task) or mixtures.is_one(task):
    return get_vocabulary().decode
  return get_task(task).output_features['inputs'].vocabulary.decode


def get_task(name: str, image_size: image_sizes.ImageSize = 64) -> seqio.Task | seqio.Mixture:
  """Returns a task with gin's current configuration, and registers it with seqio.

  Tasks of `datasets` and `mixtures` are recreated at each call, since gin's configuration may have
  changed since their registration.

  Args:
    name: a task of `datasets` or `mixtures`, or any task or mixture in seqio's registry.
    image_size: the run's picture size in pixels, at which OpenMoji is rendered.

  Raises:
    UserError: the task doesn't exist, or its data can't be found.
  """
  if mixtures.is_one(name):
    mixtures.get(name, image_size)  # Checks the mixture as a whole.
    mixture = Mixture(
      name,
      [(make_task(part, image_size), float(share)) for part, share in mixtures.tasks(name).items()],
    )
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add_provider(name, mixture)
    return mixture
  if not datasets.is_ours(name):
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
      return seqio.get_mixture_or_task(name)
    raise UserError(
      f'unknown task {name!r}; choose from {", ".join([*datasets.names(), *mixtures.NAMES])}'
    )
  task = make_task(name, image_size)
  if task.name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(task.name)
  seqio.TaskRegistry.add_provider(task.name, task)
  return task


def make_task(
  name: str, image_size: image_sizes.ImageSize = 64, keep_captions: bool = False
) -> Task:
  """Returns a task of `datasets` with gin's current configuration, without registering it.

  Args:
    name: name of the task.
    image_size: as in `get_task`.
    keep_captions: whether examples keep the text of 'inputs' as 'inputs_pretokenized', tf.string
      [], which seqio and t5x use to name examples in their outputs.

  Raises:
    UserError: the task's data can't be found.
  """
  dataset = datasets.get(name, image_size)
  if dataset.text_features is not None:
    raise UserError(
      f'{dataset.source.name} has text features, which seqio and t5x do not use; '
      f'{text_features.WITHOUT}'
    )
  vocabulary = dataset.vocabulary
  features: dict[str, seqio.Feature] = {}
  steps: list[Callable] = [preprocessors.number, preprocessors.leave_out]
  if vocabulary is not None:
    features['inputs'] = text_feature(vocabulary)
    steps.append(
      functools.partial(preprocessors.tokenize_captions, vocabulary=vocabulary, keep=keep_captions)
    )
    if dataset.features != ('inputs',):  # An encoder learns nothing from an empty text.
      steps.append(functools.partial(preprocessors.drop_text, vocabulary=vocabulary))
  if 'images' in dataset.features:
    features['images'] = _feature(256, dtype=tf.uint8, rank=3)
    steps.append(preprocessors.decode_images)
  if 'targets' in dataset.features:
    features['targets'] = _feature(dataset.sizes['targets'])
    steps.append(preprocessors.rename_tokens)
  return Task(
    dataset.name,
    SeqioSource(dataset.source, dataset.features != ('inputs',)),
    features,
    steps,
    shuffle_buffer_size=None,
  )


def text_feature(vocabulary: text_tokenizer.TextTokenizer) -> seqio.Feature:
  """Returns the feature 'inputs' for ids of a vocabulary."""
  is_ours = isinstance(vocabulary, vocabulary_lib.TextVocabulary)
  return _feature(vocabulary.size, eos_id=vocabulary_lib.EOS_ID if is_ours else None)


def _feature(size: int, eos_id: int | None = None, **kwargs) -> seqio.Feature:
  # The preprocessors already return ids; seqio only needs their range.
  vocabulary = seqio.PassThroughVocabulary(size, eos_id=eos_id)
  return seqio.Feature(vocabulary, add_eos=False, **kwargs)


def place(task: seqio.Task | seqio.Mixture) -> str:
  """Returns a description of the data that a task reads."""
  source = getattr(task, 'source', None)
  return getattr(source, 'place', task.name)


def check_lengths(task: seqio.Task | seqio.Mixture, lengths: Mapping[str, int]) -> None:
  """Raises UserError unless `lengths` fits a task's features and the tokens of its pictures."""
  datasets.check_lengths(task.name, task.output_features, lengths)
  source = _source(task)
  tokens = source.info.get('image_tokens') if source is not None else None
  if source is not None and tokens and lengths.get('targets') != tokens:
    raise UserError(
      f'{source.name} has {tokens} tokens per picture, but '
      f"feature_lengths['targets'] = {lengths['targets']}"
    )
