"""Runs the jobs of `parti-jax tokenize`: the splits of a source or of an older token cache."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import gin

from parti_jax.core import compilation_cache
from parti_jax.core import gin_config
from parti_jax.data import image_decoding
from parti_jax.data import input_parts
from parti_jax.data import sources
from parti_jax.data import tally
from parti_jax.data import token_cache
from parti_jax.data import token_cache_parts
from parti_jax.data import token_cache_v1
from parti_jax.data import views
from parti_jax.data.sources import base
from parti_jax.runs import distributed
from parti_jax.tokenization import tokenizing
from parti_jax.tokenization import tokenizing_progress
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training.objectives import frozen_text_encoder
from parti_jax.training.objectives import frozen_tokenizer

Connect = Callable[[], tuple[int, int]]
# Seconds between two checks for the parts of other processes, and between two messages about them.
_LOOK, _SAY = 5, 60
# A source's gin parameters that may differ between hosts.
_HOST_PARAMETERS = ('path', 'data_dir', 'splits', 'size')


@dataclasses.dataclass(frozen=True)
class Job:
  """A split to write.

  Attributes:
    parts: the parts to write.
    examples: returns the number of examples of some parts; None if they must be read to count them.
    write: writes some parts and reports progress.
    summary: text to print after the finished split's number of examples.
  """

  parts: token_cache_parts.SplitParts
  examples: Callable[[Sequence[int]], int | None]
  write: Callable[[Sequence[int], tokenizing_progress.Progress], None]
  summary: str


def of_source(args: argparse.Namespace, connect: Connect) -> tuple[list[Job], int, int]:
  """Returns jobs for the splits of the source that gin selects.

  Args:
    args: the command's arguments.
    connect: connects to the other processes, before any device is used.

  Returns:
    The jobs, the index of this process and the number of processes.

  Raises:
    UserError: a split or the tokenizer can't be read.
  """
  gin_config.parse(args.gin_file, args.gin_bindings)
  name = sources.chosen()
  splits = _splits(args.splits, sources.configured(name))
  worker, workers = connect()
  distributed.check_connected()
  compilation_cache.enable()
  tokenizer = frozen_tokenizer.load(args.tokenizer)
  model = tokenizer.config
  encoder = frozen_tokenizer.Encoder(tokenizer, args.dtype)
  texts = _text_encoder(args, encoder.dtype)
  source = sources.configured(name, model.image_size)
  # Open all splits first, to find unreadable ones before hours have gone into the first.
  size = (
    token_cache.EXAMPLES_PER_SHARD_WITH_TEXT_FEATURES if texts else token_cache.EXAMPLES_PER_SHARD
  )
  opened = {split: input_parts.InputParts(source.open(split), size=size) for split in splits}
  info = {
    'codebook_size': model.codebook_size,
    'image_tokens': model.image_length,
    'grid': list(model.grid),
    'tokenizer': tokenizer.fingerprint,
    'views': args.views,
    **(texts.features.info() if texts else {}),
  }
  preparation = views.Preparation(model.image_size, args.views, image_decoding.configured())

  def job(split: str) -> Job:
    made_with = {
      'image_size': model.image_size,
      'dtype': encoder.dtype,
      'platform': encoder.platform,
      'source': _settings(name),
      **opened[split].description(),
    }
    parts = token_cache_parts.SplitParts(
      args.output_dir, split, info, made_with, len(opened[split]), splits if args.overwrite else ()
    )

    def write(indices: Sequence[int], progress: tokenizing_progress.Progress) -> None:
      tokenizing.tokenize(
        encoder, texts, opened[split], indices, preparation, parts, info, args.batch_size, progress
      )

    sequences = f'{args.views} × ' if args.views > 1 else ''
    summary = f'pictures, {sequences}{model.image_length} tokens each'
    return Job(parts, opened[split].examples, write, summary + _described(texts))

  return [job(split) for split in splits], worker, workers


def _text_encoder(args: argparse.Namespace, dtype: str) -> frozen_text_encoder.Encoder | None:
  """Returns what computes text features; None without --text_encoder."""
  if args.text_encoder is None:
    return None
  encoder = frozen_text_encoder.load(args.text_encoder, args.text_length)
  texts = frozen_text_encoder.Encoder(encoder, dtype, args.text_features_dtype or 'bfloat16')
  per_token, length = texts.features.bytes_of_token, texts.features.text_length
  print(
    f'--text_encoder adds {per_token:,} bytes for each text token, at most {per_token * length:,} '
    f'for a caption of {length} tokens'
  )
  return texts


def _described(texts: frozen_text_encoder.Encoder | None) -> str:
  """Returns what to print about text features after the number of image tokens."""
  return (
    f', with text features ({texts.features.width} in {texts.features.dtype} for each text token)'
    if texts
    else ''
  )


def of_old_cache(args: argparse.Namespace, connect: Connect) -> tuple[list[Job], int, int]:
  """Returns jobs that convert the splits of a token cache of version 1, like `of_source`."""
  cache = token_cache_v1.OldCache(args.convert)
  splits = _splits(args.splits, cache)
  files = {split: cache.files(split) for split in splits}
  info = {**cache.info, 'views': 1}
  worker, workers = connect()

  def job(split: str) -> Job:
    parts = token_cache_parts.SplitParts(
      args.output_dir,
      split,
      info,
      {'converted': 'version 1', 'digest': base.digest_of(files[split])},
      len(files[split]),
      splits if args.overwrite else (),
    )

    def write(indices: Sequence[int], progress: tokenizing_progress.Progress) -> None:
      for index in indices:
        skipped: collections.Counter[str] = collections.Counter()
        records = cache.records(files[split][index], skipped)
        parts.write(index, _counted(records, progress), {'skipped': skipped, 'shortened': {}})
        progress.add(0, skipped)
        progress.end_part()

    return Job(parts, lambda indices: None, write, f'pictures, {info["image_tokens"]} tokens each')

  return [job(split) for split in splits], worker, workers


def run(jobs: Sequence[Job], worker: int, workers: int, together: bool, overwrite: bool) -> None:
  """Writes the parts of one process, and merges finished parts into splits.

  Args:
    jobs: the splits.
    worker: index of this process.
    workers: number of processes.
    together: whether all processes run at the same time and wait for each other.
    overwrite: whether to replace data that was made with other settings.
  """
  todo = [job for job in jobs if job.parts.check(overwrite)]
  for job in jobs:
    if job in todo:
      job.parts.begin()
    else:
      job.parts.clean()
      print(f'{_line(job)} (finished before)')
  for job in todo:
    _write(job, job.parts.unfinished(range(worker, job.parts.count, workers)))
    if not together:
      _merge_if_complete(job, worker, workers)
  for job in todo if together else ():
    if worker == 0:
      _wait_for(job)
      _merge(job)
    else:
      _wait('process 0 is moving the shards to their final names', job, job.parts.finished)


def _write(job: Job, indices: Sequence[int]) -> None:
  if indices:
    with contextlib.closing(
      tokenizing_progress.Progress(job.parts.split, len(indices), job.examples(indices))
    ) as progress:
      job.write(indices, progress)


def _merge_if_complete(job: Job, worker: int, workers: int) -> None:
  left = job.parts.left()
  if left:
    print(
      f'{job.parts.split}: worker {worker} of {workers} is done; {len(left):,} of '
      f'{job.parts.count:,} parts are left for the others, such as part {left[0]} for '
      f'--worker={left[0] % workers}/{workers}'
    )
  else:
    _merge(job)


def _merge(job: Job) -> None:
  while not job.parts.merge():
    _write(job, job.parts.left())  # Rewrites parts that were damaged after writing.
  print(_line(job))


def _line(job: Job) -> str:
  """Returns the line to print about a finished split."""
  found = job.parts.summary()
  line = f'{job.parts.folder}: {job.parts.split}: {found["examples"]} {job.summary}'
  for name, words in (('skipped', 'skipped'), ('shortened', 'kept in part')):
    if found[name]:
      line += f'; {words}: {tally.listed(found[name])}'
  return line


def _wait_for(job: Job) -> None:
  """Waits until all parts are finished."""
  while left := job.parts.left():
    _wait(
      f'{len(left):,} of {job.parts.count:,} parts are being written by other processes, which '
      f'must all see the same --output_dir',
      job,
      lambda: job.parts.is_written(left[0]),
    )


def _wait(what: str, job: Job, done: Callable[[], bool]) -> None:
  say = time.monotonic() + _SAY
  while not done():
    if time.monotonic() > say:
      say = time.monotonic() + _SAY
      print(f'{job.parts.split}: {what}', file=sys.stderr, flush=True)
    time.sleep(_LOOK)


def _counted(records: Iterator[bytes], progress: tokenizing_progress.Progress) -> Iterator[bytes]:
  for record in records:
    progress.add(1, {})
    yield record


def _settings(name: str) -> dict[str, Any]:
  """Returns the gin values that decide how a source and its pictures are read."""
  kind = sources.kind(name)
  with gin.config_scope(None if kind == name else name):
    found = {
      'kind': kind,
      **{
        f'{configurable}.{key}': value
        for configurable in (kind, 'decode_images')
        for key, value in sorted(gin.get_bindings(configurable).items())
        if key not in _HOST_PARAMETERS
      },
    }
  return found


def _splits(wanted: list[str] | None, source: Any) -> list[str]:
  """Returns the splits to write: the wanted ones, by default all splits of the source."""
  if not wanted:
    wanted = list(source.splits)
    if len(wanted) > 1:
      print(
        f'{source.place} has the splits {", ".join(wanted)}; use --splits to select some of them'
      )
  for split in wanted:
    source.check_split(split)
  return list(dict.fromkeys(wanted))
