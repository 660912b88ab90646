"""The Beam pipeline: prepares shards, finds duplicates among all examples, and removes them.

Each part of the source becomes a shard, so pictures never travel between workers. Only rows of a
few dozen bytes do, one for each example. They are grouped by digest, by perceptual hash and by
pieces of the hash, and examples that lose against a better one are removed from their shard. The
result doesn't depend on how a runner divides the work, and each step may be repeated.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from parti_jax.core.errors import UserError
from parti_jax.preparation import duplicates
from parti_jax.preparation import hashes
from parti_jax.preparation import report
from parti_jax.preparation import shards
from parti_jax.preparation.duplicates import Row
from parti_jax.preparation.output import Output
from parti_jax.preparation.settings import Settings
from parti_jax.preparation.shards import Outcome
from parti_jax.preparation.work import Work


@contextlib.contextmanager
def _quietly(level: int = logging.WARNING) -> Iterator[None]:
  """Suppresses Beam's log up to a level, such as warnings about services that we don't use."""
  before = logging.root.manager.disable
  logging.disable(level)
  try:
    yield
  finally:
    logging.disable(before)


with _quietly():
  import apache_beam as beam
  from apache_beam.options import pipeline_options
  from apache_beam.runners.portability.fn_api_runner import fn_runner
  from apache_beam.transforms import environments

_EXACT, _NEAR = 'duplicate picture', 'picture that looks like another'
# Runners that work in processes on this machine.
_LOCAL_RUNNERS = (
  None,
  'FnApiRunner',
  'DirectRunner',
  'SwitchingDirectRunner',
  'BundleBasedDirectRunner',
  'PrismRunner',
)
# A row's digest or hash -> the rows with it.
Group = tuple[Any, Iterable[tuple]]


class _Prepare(beam.DoFn):
  """Writes the shard of a part; yields a row for each example, and the part's outcome."""

  def __init__(self, work: Work, settings: Settings, to_srgb: bool, output: Output):
    self._work, self._settings, self._to_srgb, self._output = work, settings, to_srgb, output

  def process(self, number: int) -> Iterator[Any]:
    examples = self._work.read(number)
    outcome, rows = shards.write(
      self._output.staging_place(number), number, examples, self._settings, self._to_srgb
    )
    yield beam.pvalue.TaggedOutput('outcomes', (number, outcome))
    yield from map(tuple, rows)


class _KeepBest(beam.DoFn):
  """Yields the best row of a group; drops the others for a reason."""

  def __init__(self, reason: str):
    self._reason = reason

  def process(self, group: Group) -> Iterator[Any]:
    for row, is_best in duplicates.ranked(Row(*row) for row in group[1]):
      yield tuple(row) if is_best else beam.pvalue.TaggedOutput('drops', _drop(row, self._reason))


class _DropNear(beam.DoFn):
  """Yields the drops of a group of rows whose hashes have a piece in common."""

  def __init__(self, distance: int):
    self._distance = distance

  def process(self, group: Group) -> Iterator[Any]:
    for row in duplicates.near_losers((Row(*row) for row in group[1]), self._distance):
      yield _drop(row, _NEAR)


class _Finish(beam.DoFn):
  """Moves a shard to its final path without the dropped examples, and yields its outcome."""

  def __init__(self, output: Output):
    self._output = output

  def process(self, element) -> Iterator[Outcome]:
    number, found = element
    (outcome,) = found['outcomes']
    yield shards.finish(
      self._output.staging_place(number), self._output.place(number), outcome, dict(found['drops'])
    )


class _Publish(beam.DoFn):
  """Writes the report and `info.json` when all shards are in place."""

  def __init__(self, output: Output, source: str, settings: Settings, parts: int):
    self._output, self._source, self._settings, self._parts = output, source, settings, parts

  def process(self, outcomes: list[Outcome]) -> None:
    if len(outcomes) != self._parts:
      raise RuntimeError(f'{len(outcomes)} shards were written of {self._parts}')
    outcomes = sorted(outcomes, key=lambda outcome: outcome.number)
    self._output.publish(
      [outcome.shard for outcome in outcomes], report.make(outcomes, self._source, self._settings)
    )


def _drop(row: Row, reason: str) -> tuple[int, tuple[int, str]]:
  return row.shard, (row.position, reason)


def _bands(row: tuple, distance: int) -> Iterator[tuple[tuple[int, int], tuple]]:
  for band in hashes.bands(Row(*row).look, distance):
    yield band, row


def _drops(rows, settings: Settings):
  """Returns the dropped examples of each shard, and the reasons."""
  drops = []
  if settings.duplicates is not None:
    rows, lost = (
      rows
      | 'by digest' >> beam.Map(lambda row: (row[0], row))
      | 'same digest' >> beam.GroupByKey()
      | 'best of digest' >> beam.ParDo(_KeepBest(_EXACT)).with_outputs('drops', main='best')
    )
    drops.append(lost)
  if settings.near_duplicates is not None:
    rows, lost = (
      rows
      | 'with hash' >> beam.Filter(lambda row: row[1] >= 0)
      | 'by hash' >> beam.Map(lambda row: (row[1], row))
      | 'same hash' >> beam.GroupByKey()
      | 'best of hash' >> beam.ParDo(_KeepBest(_NEAR)).with_outputs('drops', main='best')
    )
    drops.append(lost)
  if settings.near_duplicates:
    drops.append(
      rows
      | 'by piece' >> beam.FlatMap(_bands, settings.near_duplicates)
      | 'same piece' >> beam.GroupByKey()
      | 'near' >> beam.ParDo(_DropNear(settings.near_duplicates))
    )
  return drops | 'drops' >> beam.Flatten()


def add_steps(
  root, work: Work, settings: Settings, to_srgb: bool, output: Output, source: str
) -> None:
  """Adds the steps to a pipeline.

  Args:
    root: the pipeline.
    work: the work to read.
    settings: the preparation of examples.
    to_srgb: whether colors are converted to sRGB.
    output: the output for shards.
    source: description of the source, for the report.
  """
  rows, outcomes = (
    root
    | 'parts' >> beam.Create(range(len(work)))
    | beam.Reshuffle()
    | 'prepare'
    >> beam.ParDo(_Prepare(work, settings, to_srgb, output)).with_outputs('outcomes', main='rows')
  )
  if output.staged:
    drops = (
      _drops(rows, settings) if settings.drops_duplicates else root | 'no drops' >> beam.Create([])
    )
    outcomes = (
      {'outcomes': outcomes, 'drops': drops}
      | 'by shard' >> beam.CoGroupByKey()
      | 'finish' >> beam.ParDo(_Finish(output))
    )
  else:
    outcomes = outcomes | 'outcome' >> beam.Values()
  _ = (
    outcomes
    | 'all' >> beam.combiners.ToList()
    | 'publish' >> beam.ParDo(_Publish(output, source, settings, len(work)))
  )


def make(flags: Sequence[str], workers: int) -> tuple[beam.Pipeline, str]:
  """Makes a pipeline without steps.

  Args:
    flags: Beam's flags from the command line. The default runner is Beam's local one.
    workers: processes of a local runner, unless --direct_num_workers is set.

  Returns:
    The pipeline, and a description of where it runs.

  Raises:
    UserError: a flag is unknown to Beam, a value is wrong, or a runner's flag is missing.
  """
  options = _options(flags)
  standard = options.view_as(pipeline_options.StandardOptions)
  # Not DirectRunner, which first tries to download another runner.
  standard.runner = standard.runner or 'FnApiRunner'
  runner, where = standard.runner, standard.runner
  if is_local(options):
    with _quietly():
      known, every = (
        options.get_all_options(retain_unknown_options=retain).keys() for retain in (False, True)
      )
    if unknown := sorted(every - known):
      raise UserError(f'--{unknown[0]}: neither parti-jax prepare nor Beam knows this flag')
    direct = options.view_as(pipeline_options.DirectOptions)
    if not any(flag.partition('=')[0] == '--direct_num_workers' for flag in flags):
      direct.direct_num_workers = workers
    processes = direct.direct_num_workers or os.cpu_count() or 1
    where = f'{processes} process{"es" if processes > 1 else ""} (--direct_num_workers)'
    if runner == 'FnApiRunner' and processes > 1:
      runner = fn_runner.FnApiRunner(
        environments.SubprocessSDKEnvironment.from_command_string(
          f'{shlex.quote(sys.executable)} -m parti_jax.preparation.worker'
        )
      )
  try:
    with _quietly():
      return beam.Pipeline(runner, options=options), where
  except (ValueError, ImportError) as error:
    raise UserError(f'Beam: {error}') from error


def is_local(options: pipeline_options.PipelineOptions) -> bool:
  """Returns whether the runner works in processes on this machine."""
  return options.view_as(pipeline_options.StandardOptions).runner in _LOCAL_RUNNERS


def _options(flags: Sequence[str]) -> pipeline_options.PipelineOptions:
  """Parses Beam's flags."""
  for before, flag in zip(('', *flags), flags):
    if not flag.startswith('--') and ('=' in before or not before.startswith('--')):
      raise UserError(f"{flag!r} is not a flag; Beam's flags begin with --")
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), _quietly():
      options = pipeline_options.PipelineOptions(list(flags))
      options.get_all_options()
    return options
  except SystemExit as error:
    found = re.search(r'error: (.*)', said.getvalue())
    raise UserError(f'Beam: {found[1] if found else "wrong flags"}') from error


def run(pipeline: beam.Pipeline, tick: Callable[[], None], seconds: float) -> None:
  """Runs a pipeline to its end.

  Args:
    pipeline: a pipeline with its steps.
    tick: called repeatedly while the pipeline runs.
    seconds: interval between two calls.

  Raises:
    UserError: a step has raised it, or the runner has given up.
  """
  ended = threading.Event()

  def ticking():
    while not ended.wait(seconds):
      with contextlib.suppress(OSError, UserError):  # A failing store may work next time.
        tick()

  thread = threading.Thread(target=ticking, name='progress', daemon=True)
  thread.start()
  try:
    # Errors of local workers are raised here; for other runners, their log is the only information.
    with _quietly(logging.ERROR) if is_local(pipeline.options) else contextlib.nullcontext():
      state = pipeline.run().wait_until_finish()
  except Exception as error:
    if message := _user_error(error):
      raise UserError(message) from error
    raise
  finally:
    ended.set()
    thread.join()
  if state != 'DONE':
    raise UserError(f'the pipeline ended in the state {state}; see the log of its runner')


def _user_error(error: Exception) -> str:
  """Returns the message of a step's UserError, '' for other errors."""
  text = str(error)
  if not isinstance(error, UserError):
    # Other processes pass their errors on as text.
    name = f'{UserError.__module__}.{UserError.__qualname__}'
    found = re.search(rf'{re.escape(name)}: ([^\n]+)', text)
    text = found[1] if found else ''
  return text.partition(' [while running')[0]
