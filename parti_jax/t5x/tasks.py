"""Our seqio tasks as t5x takes them: importing this module registers them.

`import parti_jax.t5x.tasks` in a gin file, or MIXTURE_OR_TASK_MODULE = 'parti_jax.t5x.tasks'; then
MIXTURE_OR_TASK_NAME may be any task of `parti_jax.data.datasets`, such as 'openmoji_tokens', or a
mixture of `parti_jax.data.mixtures`, such as 'mixture_tokens'. It needs seqio and no t5x.

A task is registered while gin's files are still being read. So it settles its source, its
vocabulary and its features when they are first asked for, as gin configures them then
(`token_cache.path`, `vocabulary.path` ...), and a mixture its tasks (`mixture.sources`).

t5x reads a split without end to train, and a finite number of times to evaluate and to
infer. So texts are dropped for classifier-free guidance in endless readings alone.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

import gin
from absl import logging

from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import mixtures
from parti_jax.data import tally
from parti_jax.data import tasks
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.quiet_tensorflow import tf
from parti_jax.t5x import inputs
from parti_jax.t5x import metrics

# Tasks with metrics for seqio's evaluator; without any it passes a task over.
_METRICS = {
  'openmoji_tokens': (metrics.openmoji_alignment, metrics.log_likelihood),
  'cached_tokens': (metrics.log_likelihood,),
}
_DEFAULT_IMAGE_SIZE = 64


def _metrics(name: str):
  return _METRICS.get(name, _METRICS['cached_tokens'] if name.endswith('_tokens') else None)


class LazyTask(seqio.Task):
  """A task of `parti_jax.data.datasets` that is made when it is first used.

  Examples carry their caption as 'inputs_pretokenized', by which t5x's `infer` and seqio's loggers
  name them.
  """

  def __init__(self, name: str):
    """Makes a task that stands for one of `parti_jax.data.datasets`, of which nothing is read yet.

    Args:
      name: of the task there; 'images', 'pairs' and 'texts' mean the source that gin chooses.
    """
    super().__init__(
      name,
      source=None,
      output_features={},
      shuffle_buffer_size=None,
      postprocess_fn=metrics.postprocess if _metrics(name) else None,
      metric_fns=_metrics(name),
    )
    self._feature_names = datasets.feature_names(name)
    self._settled: dict[int, _Task] = {}

  def settled(self, image_size: int = _DEFAULT_IMAGE_SIZE) -> _Task:
    """Returns the task as gin configured it when it was first asked for.

    Args:
      image_size: height and width at which OpenMoji draws its pictures, in pixels.

    Raises:
      UserError: its data can't be found, or a checkpoint that t5x's gin values name was trained
        with another vocabulary or tokenizer.
    """
    if image_size not in self._settled:
      made = tasks.make_task(self.name, image_size, keep_captions='inputs' in self._feature_names)
      self._settled[image_size] = _Task(
        self.name,
        made.source,
        made.output_features,
        made.preprocessors,
        self.postprocessor,
        _metrics(self.name),
        shuffle_buffer_size=made.shuffle_buffer_size,
      )
      check_inputs(made)
    return self._settled[image_size]

  @property
  def source(self) -> seqio.DataSource:
    return self.settled().source

  @property
  def output_features(self) -> Mapping[str, seqio.Feature]:
    return _Features(self, self._feature_names)

  @property
  def preprocessors(self) -> Sequence:
    return self.settled().preprocessors

  def replace(self, **kwargs) -> _Task:
    """Returns a variant of the settled task; see `seqio.Task.replace`."""
    return self.settled().replace(**kwargs)

  def get_dataset(
    self, sequence_length: Mapping[str, int] | None = None, *args, **kwargs
  ) -> tf.data.Dataset:
    """Reads a split of the task that is settled for these lengths; see there."""
    size = (sequence_length or {}).get('images', _DEFAULT_IMAGE_SIZE)
    return self.settled(size).get_dataset(sequence_length, *args, **kwargs)


class _Task(tasks.Task):
  """A settled task: its data is as gin said, and reading it obeys the rules of this module."""

  def replace(self, **kwargs) -> _Task:
    """Returns a variant, which is read by the same rules; see `seqio.Task.replace`."""
    made = super().replace(**kwargs)  # Of seqio's own class.
    # Behind those that were given there is one for each of `metric_fns`.
    given = made.metric_objs[: len(made.metric_objs) - len(made.metric_fns)]
    return _Task(
      made.name,
      made.source,
      made.output_features,
      made.preprocessors,
      made.postprocessor,
      made.metric_fns,
      given,
      made.shuffle_buffer_size,
    )

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

    With num_epochs=None, as t5x trains, texts are dropped (`preprocessors.drop_text`). Each epoch
    is shuffled on its own. What is left out is counted, and said in warnings.

    Raises:
      UserError: the data can't be read, the lengths don't fit, or no example is usable.
    """
    del try_in_mem_cache
    lengths = sequence_length or {}
    tasks.check_lengths(self, lengths)
    self._check_usable(lengths, split, shard_info)
    where = f'{self.name}, {split}'
    reading = tally.Reading(
      skipped=_Told(f'{where}: skipped'),
      shortened=_Told(f'{where}: kept in part'),
      drop_text=num_epochs is None,
    )
    with tally.reading(reading):
      return super().get_dataset(
        lengths,
        split,
        use_cached=use_cached,
        shuffle=shuffle,
        shuffle_buffer_size=shuffle_buffer_size,
        seed=seed,
        shard_info=shard_info,
        num_epochs=num_epochs,
        trim_output_features=trim_output_features,
      )

  def _check_usable(self, lengths, split: str, shard_info) -> None:
    """Raises UserError if no example is usable, since reading without end would look for ever."""
    reading = tally.Reading()
    with tally.reading(reading):
      dataset = super().get_dataset(lengths, split, shuffle=False, shard_info=shard_info)
    if next(iter(dataset.take(1)), None) is None:
      share = (
        f'share {shard_info.index + 1} of {shard_info.num_shards} of '
        if shard_info and shard_info.num_shards > 1
        else ''
      )
      skipped = str(reading.skipped)
      raise UserError(
        f'{self.name}, {split}: there is no usable example in {share}'
        f'{tasks.place(self)}' + (f'; skipped {skipped}' if skipped else '')
      )


class LazyMixture(tasks.Mixture):
  """A mixture of `parti_jax.data.mixtures` that settles its tasks when it is first used.

  Args:
    name: of the mixture.
  """

  def __init__(self, name: str):
    self._name, self._source_info, self._sub_mixtures = name, None, ()
    self._sample_fn = tasks.take_turns

  # What seqio's own class keeps under these names.
  @functools.cached_property
  def _task_map(self) -> dict[str, LazyTask]:
    mixtures.get(self._name)  # For what is wrong with it as a whole.
    return {name: LazyTask(name) for name in mixtures.tasks(self._name)}

  @property
  def _tasks(self) -> list[LazyTask]:
    return list(self._task_map.values())

  @functools.cached_property
  def _task_to_rate(self) -> dict[str, float]:
    return {name: float(share) for name, share in mixtures.tasks(self._name).items()}


class _Features(Mapping):
  """Features of a lazy task: their names are known, what they are is asked of the settled task.

  A mixture looks at the names when it is made, while gin's files are still being read.
  """

  def __init__(self, task: LazyTask, names: tuple[str, ...]):
    self._task, self._names = task, names

  def __getitem__(self, name: str) -> seqio.Feature:
    if name not in self._names:
      raise KeyError(name)
    # Not `output_features` of the lazy task, which is this mapping.
    return self._task.settled().output_features[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


class _Told(tally.Tally):
  """A tally that tells its counts whenever they have doubled, and at the end of the process.

  t5x has no place where an epoch ends, and a warning for each example would fill a log.
  """

  def __init__(self, what: str):
    """`what` stands before the counts."""
    super().__init__()
    self._what, self._total, self._told = what, 0, 0
    self._telling = threading.Lock()

  def add(self, reason: str, place: str = '') -> None:
    """Counts one more for this reason; see `tally.Tally.add`."""
    with self._telling:
      super().add(reason, place)
      self._total += 1
      if self._total == 1:
        atexit.register(self._at_exit)
      if self._total >= 2 * self._told:
        self._tell()

  def _at_exit(self) -> None:
    with self._telling:
      if self._told != self._total:
        self._tell()

  def _tell(self) -> None:
    self._told = self._total
    logging.warning('%s, in all epochs so far: %s', self._what, str(self))


@gin.configurable(module='parti_jax.t5x')
def check_inputs(task: seqio.Task, allow_mismatch: bool = False) -> None:
  """Compares a task's vocabulary and tokenizer with the checkpoints that t5x's gin values name.

  Args:
    task: of `parti_jax.data.datasets`.
    allow_mismatch: whether to warn of what differs and go on.

  Raises:
    UserError: if a checkpoint was trained with another vocabulary or tokenizer.
  """
  given = {
    'vocabulary': tasks.vocabulary_fingerprint(task),
    'tokenizer': tasks.tokenizer_fingerprint(task),
  }
  for line in inputs.check(given, allow_mismatch):
    logging.warning('%s', line)


@gin.configurable(module='parti_jax.t5x')
def text_vocabulary() -> seqio.Vocabulary:
  """Returns the vocabulary of our tasks' feature 'inputs', as `vocabulary.path` says."""
  return tasks.text_feature(tasks.get_vocabulary()).vocabulary


def register() -> None:
  """Registers all tasks and mixtures with seqio, in place of those of the same names, unsettled."""
  for name in (*datasets.names(), *datasets.ALIASES):
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add_provider(name, LazyTask(name))
  for name in mixtures.NAMES:
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add_provider(name, LazyMixture(name))


register()
