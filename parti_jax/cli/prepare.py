"""`parti-jax prepare`: filters, deduplicates and resizes pictures, with Apache Beam."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from parti_jax.core import gin_config
from parti_jax.core import storage

# Unknown flags go to Beam.
OTHER_FLAGS = True
# Seconds between two lines of progress, for local and for remote runners.
_LOCAL_SECONDS, _REMOTE_SECONDS = 5.0, 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  gin_config.add_gin_arguments(parser)
  parser.add_argument(
    '--output_dir',
    required=True,
    metavar='DIR',
    help='output folder of the prepared pictures, for gin_configs/tasks/prepared.gin; a path or a '
    'URL',
  )
  parser.add_argument(
    '--split',
    default='train',
    help='split of the source and of the output (default: %(default)s)',
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace the split in the output folder if it exists'
  )
  parser.epilog = (
    "All other flags are Apache Beam's: --direct_num_workers=8 for eight processes (default: "
    'one per core), --runner=DataflowRunner --project=... for another runner.'
  )


def run(args: argparse.Namespace) -> int:
  """Prepares a split and prints statistics of its examples; returns the exit status."""
  from parti_jax.core.errors import UserError
  from parti_jax.data import image_decoding
  from parti_jax.data import sources
  from parti_jax.data.sources import prepared
  from parti_jax.preparation import output as output_lib
  from parti_jax.preparation import pipeline
  from parti_jax.preparation import report
  from parti_jax.preparation import settings as settings_lib
  from parti_jax.preparation import similarity
  from parti_jax.preparation import work as work_lib

  gin_config.parse(args.gin_file, args.gin_bindings)
  settings = settings_lib.Settings()
  to_srgb = image_decoding.configured().keywords['to_srgb']
  source = sources.configured(sources.chosen())
  if not source.has_pictures:
    raise UserError(f'{source.place} has no pictures; choose another data.source')
  source.check_split(args.split)
  if isinstance(source, prepared.PreparedSource) and _same(source.path, args.output_dir):
    raise UserError(f'--output_dir={args.output_dir} is the input folder; choose another')
  work = work_lib.Work(source, args.split, settings)
  parts = len(work)
  beam_pipeline, where = pipeline.make(args.other_flags, min(os.cpu_count() or 1, parts))
  work.check_columns()
  similarity.check(settings)
  output = output_lib.Output(args.output_dir, args.split, settings.drops_duplicates)
  pipeline.add_steps(beam_pipeline, work, settings, to_srgb, output, source.place)

  output.claim(args.overwrite)
  print(
    f'{source.place}, {args.split}: {parts:,} shards to {args.output_dir}, on {where}', flush=True
  )
  progress = _Progress(output, parts)
  local = pipeline.is_local(beam_pipeline.options)
  if not local:
    logging.basicConfig(level=logging.INFO)  # Runners log the job's name and page.
  try:
    pipeline.run(beam_pipeline, progress.show, _LOCAL_SECONDS if local else _REMOTE_SECONDS)
  except BaseException as error:
    # A remote pipeline continues without this process.
    if local or isinstance(error, Exception):
      output.release(finished=False)
    raise
  finally:
    progress.end()
  found = output.report()
  output.release(finished=found['written'] > 0)
  print(report.table(found))
  if not found['written']:
    raise UserError(
      f'no example of {source.place} is left, so {args.output_dir} contains only '
      f'{output_lib.REPORT}; it counts why the examples were dropped'
    )
  print(
    f'{args.output_dir}: {args.split}: {found["written"]:,} pictures in {found["shards"]:,} '
    f'shards, {found["bytes"] / 1e6:,.1f} MB; the counts are in {output_lib.REPORT}'
  )
  return 0


def _same(path: str, other: str) -> bool:
  """Returns whether two paths or URLs refer to the same folder."""
  if storage.is_url(path) or storage.is_url(other):
    return path.rstrip('/') == other.rstrip('/')
  return os.path.realpath(path) == os.path.realpath(other)


class _Progress:
  """Prints how many shards are written: on a terminal in one line, else in a new line each time."""

  def __init__(self, output, total: int):
    self._output, self._total = output, total
    self._begun, self._shown = time.monotonic(), -1

  def show(self) -> None:
    """Prints the line if it has changed."""
    written = min(self._output.written(), self._total)
    if written == self._shown:
      return
    self._shown = written
    seconds = time.monotonic() - self._begun
    left = f', about {seconds * (self._total / written - 1):,.0f} s left' if written else ''
    print(
      f'prepared {written:,} of {self._total:,} shards in {seconds:,.0f} s{left}   ',
      end='\r' if sys.stderr.isatty() else '\n',
      file=sys.stderr,
      flush=True,
    )

  def end(self) -> None:
    """Ends the line on a terminal."""
    if self._shown >= 0 and sys.stderr.isatty():
      print(file=sys.stderr)
