"""What reading costs: processor time for each example, and what grows with place, shares and files.

  python benchmarks/input.py [--json FILE] [--against FOLDER] [NAME ...]

Every measurement runs in a process of its own, on data that it draws at random. `--against` names a
checkout of another version of parti_jax, such as `git worktree add FOLDER COMMIT` makes; it is
measured in turn with this one. NAME chooses measurements:

  tokens    examples of a token cache, prepared for Parti: a second of processor time
  shares    the same as share 1 of 128
  pictures  JPEGs decoded, cropped and resized to 256 × 256: a second of processor time
  workers   the same by the clock, in one and in two worker processes
  place     seconds to the first batch at example 100 million of an index, which is emulated
  memory    MiB that one share of 128 takes, of tars of 75 kB pictures
  imports   processor seconds and MiB to import what reads
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from unittest import mock

import numpy as np
from PIL import Image

NAMES = ('tokens', 'shares', 'pictures', 'workers', 'place', 'memory', 'imports')
# What only this version can do.
_OURS_ALONE = ('workers', 'place')
_TOKENS, _EXAMPLES, _BATCH = 1024, 16_384, 128
_SHARES = 128
_PLACE = 100_000_000


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='*', metavar='NAME')
  parser.add_argument('--against', help='a checkout of another version')
  parser.add_argument('--rounds', type=int, default=3, help='of which the best is taken')
  parser.add_argument('--json', help='file for the figures')
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(globals()[f'_{args.measure}']()))
    return
  found = {}
  for name in args.names or NAMES:
    versions = {'this version': pathlib.Path(__file__).parents[1]}
    if args.against and name not in _OURS_ALONE:
      versions['against'] = pathlib.Path(args.against)
    rounds = {version: [] for version in versions}
    for _ in range(args.rounds):
      for version, folder in versions.items():
        rounds[version].append(_in_a_process(name, folder))
    found[name] = {version: _best(those) for version, those in rounds.items()}
    print(f'{name}: {json.dumps(found[name])}', flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')


def _in_a_process(name: str, folder: pathlib.Path) -> dict[str, float]:
  """A measurement of the version in a folder."""
  environment = os.environ | {
    'PYTHONPATH': str(folder),
    'JAX_PLATFORMS': 'cpu',
    'TF_CPP_MIN_LOG_LEVEL': '3',
  }
  done = subprocess.run(
    [sys.executable, '-P', os.path.abspath(__file__), '--measure', name],
    env=environment,
    stdout=subprocess.PIPE,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def _best(rounds: list[dict[str, float]]) -> dict[str, float]:
  """The best of each figure: the largest rate, and the least of anything else."""
  return {
    key: round((max if key.endswith('_a_second') else min)(one[key] for one in rounds), 3)
    for key in rounds[0]
  }


def _processor_seconds() -> float:
  """Of this process, with its threads, and of its children that have ended."""
  return sum(
    usage.ru_utime + usage.ru_stime
    for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  )


def _rate(batches, examples: int) -> float:
  """Examples for a second of processor time, once the first batches are read."""
  for _ in range(4):
    next(batches)
  start = _processor_seconds()
  for _ in range(examples // _BATCH):
    next(batches)
  return examples / (_processor_seconds() - start)


def _token_batches(folder: str, **share):
  import gin

  from parti_jax.data import batches
  from parti_jax.data import token_cache

  draw = np.random.default_rng(0)
  words = [''.join(draw.choice(list('etaoinshrdlu'), draw.integers(2, 9))) for _ in range(2000)]
  examples = (
    (' '.join(draw.choice(words, 12)), draw.integers(0, 8192, _TOKENS)) for _ in range(_EXAMPLES)
  )
  token_cache.write_token_cache(
    folder, examples, {'codebook_size': 8192, 'image_tokens': _TOKENS, 'tokenizer': 'none'}
  )
  gin.parse_config('import parti_jax.data.tasks')
  gin.bind_parameter('token_cache.path', folder)
  return batches.Batches(
    'cached_tokens', 'train', _BATCH, {'inputs': 128, 'targets': _TOKENS}, training=True, **share
  )


def _tokens() -> dict[str, float]:
  with tempfile.TemporaryDirectory() as folder, _token_batches(folder) as batches:
    return {'examples_a_second': _rate(batches, _EXAMPLES // 2)}


def _shares() -> dict[str, float]:
  with (
    tempfile.TemporaryDirectory() as folder,
    _token_batches(folder, share=0, shares=_SHARES) as batches,
  ):
    return {'examples_a_second': _rate(batches, _EXAMPLES // 8)}


def _jpeg(draw, width: int, height: int, quality: int = 90) -> bytes:
  """A picture of soft shapes with some noise."""
  coarse = draw.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
  smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
  pixels = np.clip(smooth + draw.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
  encoded = io.BytesIO()
  Image.fromarray(pixels).save(encoded, 'JPEG', quality=quality)
  return encoded.getvalue()


def _picture_batches(folder: str, **arguments):
  import gin

  from parti_jax.data import batches

  draw = np.random.default_rng(0)
  lines = []
  for index in range(256):
    pathlib.Path(folder, f'{index}.jpg').write_bytes(_jpeg(draw, 512, 400))
    lines.append(json.dumps({'file': f'{index}.jpg', 'caption': 'a picture'}))
  pathlib.Path(folder, 'train.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  gin.parse_config('import parti_jax.data.tasks')
  gin.bind_parameter('folder.path', folder)
  gin.bind_parameter('folder.splits', {'train': 'train.jsonl'})
  return batches.Batches('folder_images', 'train', _BATCH, {'images': 256}, **arguments)


def _pictures() -> dict[str, float]:
  with tempfile.TemporaryDirectory() as folder, _picture_batches(folder) as batches:
    return {'pictures_a_second': _rate(batches, 1024)}


def _workers() -> dict[str, float]:
  from parti_jax.data import share

  found = {}
  for workers in (1, 2):
    with (
      tempfile.TemporaryDirectory() as folder,
      _picture_batches(folder, settings=share.Settings(0, workers, 64)) as batches,
    ):
      for _ in range(4):
        next(batches)
      start = time.perf_counter()
      for _ in range(8):
        next(batches)
      found[f'with_{workers}_pictures_a_second'] = 8 * _BATCH / (time.perf_counter() - start)
  found['ratio_a_second'] = found['with_2_pictures_a_second'] / found['with_1_pictures_a_second']
  return found


def _place() -> dict[str, float]:
  from parti_jax.data.sources import base

  class Emulated(base.Records):
    """As many records as no disk here holds."""

    def __len__(self):
      return 4 * _PLACE

    def read(self, indices):
      return [
        {'caption': f'picture {index}'.encode(), 'tokens': np.full(_TOKENS, index % 8192)}
        for index in indices
      ]

  from parti_jax.data import batches as batches_lib
  from parti_jax.data import token_cache

  with tempfile.TemporaryDirectory() as folder:
    _token_batches(folder).close()
    with mock.patch.object(token_cache.TokenCacheSource, 'open', lambda *_, **__: Emulated()):
      start = time.perf_counter()
      with batches_lib.Batches(
        'cached_tokens', 'train', _BATCH, {'inputs': 128, 'targets': _TOKENS}
      ) as batches:
        batches.restore(batches.state() | {'taken': _PLACE, 'stream': {'position': _PLACE}})
        next(batches)
        return {'seconds': time.perf_counter() - start}


def _memory() -> dict[str, float]:
  import gin

  from parti_jax.data import batches as batches_lib

  draw = np.random.default_rng(0)
  pictures = [_jpeg(draw, 512, 384, 93) for _ in range(16)]
  with tempfile.TemporaryDirectory() as folder:
    first = os.path.join(folder, f'{0:05d}.tar')
    with tarfile.open(first, 'w') as tar:
      for index in range(3000):
        for ending, content in (('jpg', pictures[index % 16]), ('txt', b'a picture')):
          member = tarfile.TarInfo(f'{index:09d}.{ending}')
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
    for index in range(1, _SHARES):
      os.link(first, os.path.join(folder, f'{index:05d}.tar'))
    gin.parse_config('import parti_jax.data.tasks')
    gin.bind_parameter('webdataset.path', folder)
    batches = batches_lib.Batches(
      'webdataset_pairs', 'train', 16, {'inputs': 16, 'images': 64}, share=0, shares=_SHARES
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with batches:
      for _ in range(20):
        next(batches)
    return {
      'picture_kB': np.mean([len(picture) for picture in pictures]) / 1000,
      'MiB_more': (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def _imports() -> dict[str, float]:
  start = _processor_seconds()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  import parti_jax.data.batches  # noqa: F401

  return {
    'seconds': _processor_seconds() - start,
    'tensorflow': 'tensorflow' in sys.modules,
    'MiB_more': (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
  }


if __name__ == '__main__':
  main()
