"""`parti-jax tokenize`: image tokens of a source's pictures, computed once by a frozen tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import sys

import tqdm

from parti_jax import checks
from parti_jax import compilation_cache
from parti_jax import config
from parti_jax.training import frozen_tokenizer


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax tokenize`."""
  config.add_gin_arguments(parser)
  parser.add_argument('--tokenizer', required=True,
                      help="the tokenizer's run, the --model_dir that it was trained in, or an "
                      'exported model')
  parser.add_argument('--output_dir', required=True, help='folder of the token cache')
  parser.add_argument('--splits', nargs='+', metavar='SPLIT',
                      help='splits of the source (default: all that it has)')
  parser.add_argument('--batch_size', type=int, default=64, help='pictures at once')


def run(args: argparse.Namespace) -> int:
  """Writes the token cache; returns the exit status."""
  from parti_jax.data import sources  # pylint: disable=g-import-not-at-top
  from parti_jax.data import tasks
  from parti_jax.data import token_cache
  from parti_jax.training import configurables  # pylint: disable=unused-import
  checks.count('--batch_size', args.batch_size)
  config.parse(args.gin_file, args.gin_bindings)
  splits = _splits(args.splits, sources.configured(sources.chosen()))
  compilation_cache.enable()
  tokenizer = frozen_tokenizer.load(args.tokenizer)
  model = tokenizer.config
  info = {'codebook_size': model.codebook_size, 'image_tokens': model.image_length,
          'tokenizer': tokenizer.fingerprint}
  # All are opened first: what can't be read is found before hours have gone into the first.
  pictures = {split: tasks.pictures_and_captions(None, split, model.image_size)
              for split in splits}
  for split in splits:
    with contextlib.closing(pictures[split]):
      examples = frozen_tokenizer.tokenized(tokenizer, pictures[split], args.batch_size)
      bar = tqdm.tqdm(examples, desc=split, unit='picture', disable=not sys.stderr.isatty())
      count = token_cache.write_token_cache(args.output_dir, bar, info, split)
    print(f'{args.output_dir}: {split}: {count} pictures, {model.image_length} tokens each')
  return 0


def _splits(wanted: list[str] | None, source) -> list[str]:
  """Returns the splits to tokenize: those that are wanted, or all that the source has."""
  if not wanted:
    wanted = list(source.splits)
    print(f'{source.place} has the splits {", ".join(wanted)}; --splits chooses some of them')
  for split in wanted:
    source.check_split(split)
  return list(dict.fromkeys(wanted))
