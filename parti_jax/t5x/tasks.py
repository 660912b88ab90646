"""Registers our seqio tasks and mixtures for t5x when it is imported.

Import it by `import parti_jax.t5x.tasks` in a gin file, or by MIXTURE_OR_TASK_MODULE =
'parti_jax.t5x.tasks'. Then MIXTURE_OR_TASK_NAME may be any task of `parti_jax.data.datasets`, such
as 'openmoji_tokens', or a mixture of `parti_jax.data.mixtures`, such as 'mixture_tokens'. This
module needs seqio, but not t5x.

t5x imports it before gin has parsed all files. So tasks are lazy: a task creates its source,
vocabulary and features when they are first used, from gin's values at that time, such as
`token_cache.path`. A mixture creates its tasks from `mixture.sources` in the same way.

t5x repeats a split indefinitely for training, and reads it a finite number of times for evaluation
and inference. So texts are dropped for classifier-free guidance only in indefinite readings.
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

# Tasks with metrics for seqio's evaluator, which skips tasks without metrics.
_METRICS = {
  'openmoji_tokens': (metrics.openmoji_alignment, metrics.log_likelihood),
  'cached_tokens': (metrics.log_likelihood,),
}
_DEFAULT_IMAGE_SIZE = 64


def _metrics(name: str):
  return _METRICS.get(name, _METRICS['cached_tokens'] if name.endswith('_tokens') else None)


class LazyTask(seqio.Task):
  """A task of `parti_jax.data.datasets` that is created when it is first used.

  Examples have their caption as 'inputs_pretokenized', which t5x's `infer` and seqio's loggers
  write.
  """

  def __init__(self, name: str):
    """Makes a placeholder for a task, without reading anything.

    Args:
      name: name of the task in `parti_jax.data.datasets`; 'images', 'pairs' and 'texts' stand for
        the source that gin selects.
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
    self._resolved: dict[int, _Task] = {}

  def resolved(self, image_size: int = _DEFAULT_IMAGE_SIZE) -> _Task:
    """Returns the task, created from gin's values at the first call.

    Args:
      image_size: height and width at which OpenMoji renders its pictures, in pixels.

    Raises:
      UserError: its data can't be found, or a checkpoint that t5x's gin values name was trained
        with another vocabulary or tokenizer.
    """
    if image_size not in self._resolved:
      made = tasks.make_task(self.name, image_size, keep_captions='inputs' in self._feature_names)
      self._resolved[image_size] = _Task(
        self.name,
        made.source,
        made.output_features,
        made.preprocessors,
        self.postprocessor,
        _metrics(self.name),
        shuffle_buffer_size=made.shuffle_buffer_size,
      )
      check_inputs(made)
    return self._resolved[image_size]

  @property
  def source(self) -> seqio.DataSource:
    return self.resolved().source

  @property
  def output_features(self) -> Mapping[str, seqio.Feature]:
    return _Features(self, self._feature_names)

  @property
  def preprocessors(self) -> Sequence:
    return self.resolved().preprocessors

  def replace(self, **kwargs) -> _Task:
    """Returns a variant of the task, with the arguments of `seqio.Task.replace`."""
    return self.resolved().replace(**kwargs)

  def get_dataset(
    self, sequence_length: Mapping[str, int] | None = None, *args, **kwargs
  ) -> tf.data.Dataset:
    """Reads a split of the task, with the arguments of `_Task.get_dataset`."""
    size = (sequence_length or {}).get('images', _DEFAULT_IMAGE_SIZE)
    return self.resolved(size).get_dataset(sequence_length, *args, **kwargs)


class _Task(tasks.Task):
  """A task created from gin's values, with this module's rules for reading it."""

  def replace(self, **kwargs) -> _Task:
    """Returns a variant with the same rules, with the arguments of `seqio.Task.replace`."""
    made = super().replace(**kwargs)  # An instance of seqio's own class.
    # The objects that were given are followed by one for each of `metric_fns`.
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
    """Reads a split, with the arguments of `seqio.Task.get_dataset`.

    With num_epochs=None, as in t5x's training, texts are dropped (`preprocessors.drop_text`). Each
    epoch is shuffled separately. Skipped and shortened examples are counted in warnings.

    Raises:
      UserError: the data can't be read, the lengths don't match, or no example is usable.
    """
    del try_in_mem_cache
    lengths = sequence_length or {}
    tasks.check_lengths(self, lengths)
    self._check_usable(lengths, split, shard_info)
    where = f'{self.name}, {split}'
    reading = tally.Reading(
      skipped=_LoggedTally(f'{where}: skipped'),
      shortened=_LoggedTally(f'{where}: kept in part'),
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
    """Raises UserError if no example is usable, since an indefinite reading would never return."""
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
        f'{self.name}, {split}: no usable example in {share}'
        f'{tasks.place(self)}' + (f'; skipped {skipped}' if skipped else '')
      )


class LazyMixture(tasks.Mixture):
  """A mixture of `parti_jax.data.mixtures` that creates its tasks when it is first used.

  Args:
    name: name of the mixture.
  """

  def __init__(self, name: str):
    self._name, self._source_info, self._sub_mixtures = name, None, ()
    self._sample_fn = tasks.take_turns

  # These properties have the names of attributes of seqio's own class.
  @functools.cached_property
  def _task_map(self) -> dict[str, LazyTask]:
    mixtures.get(self._name)  # Raises errors about the whole mixture.
    return {name: LazyTask(name) for name in mixtures.tasks(self._name)}

  @property
  def _tasks(self) -> list[LazyTask]:
    return list(self._task_map.values())

  @functools.cached_property
  def _task_to_rate(self) -> dict[str, float]:
    return {name: float(share) for name, share in mixtures.tasks(self._name).items()}


class _Features(Mapping):
  """The features of a lazy task. Only access to a feature, not to the names, creates the task.

  A mixture reads the names when it is made, before gin has parsed all files.
  """

  def __init__(self, task: LazyTask, names: tuple[str, ...]):
    self._task, self._names = task, names

  def __getitem__(self, name: str) -> seqio.Feature:
    if name not in self._names:
      raise KeyError(name)
    # The lazy task's own `output_features` is this mapping.
    return self._task.resolved().output_features[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


class _LoggedTally(tally.Tally):
  """A tally that logs its counts whenever they have doubled, and when the process ends.

  t5x offers no hook at the end of an epoch, and a warning for each example would flood the log.
  """

  def __init__(self, what: str):
    """Makes an empty tally; `what` precedes the counts in the log."""
    super().__init__()
    self._what, self._total, self._logged = what, 0, 0
    self._logging = threading.Lock()

  def add(self, reason: str, place: str = '') -> None:
    """Counts an example, with the arguments of `tally.Tally.add`."""
    with self._logging:
      super().add(reason, place)
      self._total += 1
      if self._total == 1:
        atexit.register(self._at_exit)
      if self._total >= 2 * self._logged:
        self._log()

  def _at_exit(self) -> None:
    with self._logging:
      if self._logged != self._total:
        self._log()

  def _log(self) -> None:
    self._logged = self._total
    logging.warning('%s, in all epochs so far: %s', self._what, str(self))


@gin.configurable(module='parti_jax.t5x')
def check_inputs(task: seqio.Task, allow_mismatch: bool = False) -> None:
  """Compares a task's vocabulary and tokenizer with those of the checkpoints in t5x's gin values.

  Args:
    task: a task of `parti_jax.data.datasets`.
    allow_mismatch: whether to log a mismatch as a warning instead of raising an error.

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
  """Returns the vocabulary of our tasks' feature 'inputs', which `vocabulary.path` selects."""
  return tasks.text_feature(tasks.get_vocabulary()).vocabulary


def register() -> None:
  """Registers lazy tasks and mixtures with seqio, replacing those of the same names."""
  for name in (*datasets.names(), *datasets.ALIASES):
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add_provider(name, LazyTask(name))
  for name in mixtures.NAMES:
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add_provider(name, LazyMixture(name))


register()
