"""`parti-jax tokenize`: image tokens of a source's pictures, computed once by a frozen tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import sys

import tqdm

from parti_jax import compilation_cache
from parti_jax import config
from parti_jax import errors
from parti_jax.training import frozen_tokenizer


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax tokenize`."""
  config.add_gin_arguments(parser)
  parser.add_argument('--tokenizer', required=True,
                      help="the tokenizer's run, the --model_dir that it was trained in, or an "
                      'exported model')
  parser.add_argument('--output_dir', required=True, help='folder of the token cache')
  parser.add_argument('--splits', nargs='+', default=['train', 'validation'],
                      help='splits of the source (default: %(default)s)')
  parser.add_argument('--batch_size', type=int, default=64, help='pictures at once')


def run(args: argparse.Namespace) -> int:
  """Writes the token cache; returns the exit status."""
  from parti_jax.data import tasks  # pylint: disable=g-import-not-at-top
  from parti_jax.data import token_cache
  from parti_jax.training import configurables  # pylint: disable=unused-import
  if args.batch_size < 1:
    raise errors.UserError(f'--batch_size={args.batch_size} must be at least 1')
  config.parse(args.gin_file, args.gin_bindings)
  compilation_cache.enable()
  model, params = frozen_tokenizer.load(args.tokenizer)
  info = {'codebook_size': model.codebook_size, 'image_tokens': model.image_length,
          'tokenizer': frozen_tokenizer.fingerprint(params)}
  for split in args.splits:
    with contextlib.closing(
        tasks.pictures_and_captions(None, split, model.image_size)) as pictures:
      examples = frozen_tokenizer.tokenized(model, params, pictures, args.batch_size)
      bar = tqdm.tqdm(examples, desc=split, unit='picture', disable=not sys.stderr.isatty())
      count = token_cache.write_token_cache(args.output_dir, bar, info, split)
    print(f'{args.output_dir}: {split}: {count} pictures, {model.image_length} tokens each')
  return 0
