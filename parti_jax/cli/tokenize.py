"""`parti-jax tokenize`: computes image tokens of a source's pictures with a frozen tokenizer."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from parti_jax.core import checks
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.runs import distributed
from parti_jax.runs import preemption


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax tokenize`."""
  gin_config.add_gin_arguments(parser)
  parser.add_argument(
    '--tokenizer',
    help="the tokenizer's run, the --model_dir that it was trained in, or an exported model",
  )
  parser.add_argument(
    '--output_dir', required=True, help='folder of the token cache, a path or a gs:// or s3:// URL'
  )
  parser.add_argument(
    '--splits', nargs='+', metavar='SPLIT', help='splits of the source (default: all)'
  )
  parser.add_argument(
    '--views',
    type=int,
    default=1,
    choices=(1, 2, 10),
    help='token sequences per picture, of which training uses one at random: '
    "1 of the central square, 2 with its mirror image, 10 with LlamaGen's "
    'corners too (default: 1)',
  )
  parser.add_argument(
    '--dtype',
    choices=('bfloat16', 'float32'),
    help='dtype of the encoders (default: bfloat16 on TPUs and GPUs, float32 on CPUs)',
  )
  parser.add_argument(
    '--text_encoder',
    metavar='FOLDER',
    help='a text encoder that `parti-jax import text_encoder` wrote; its features of each caption '
    'are stored too, so that training a generator with it frozen does not run it',
  )
  parser.add_argument(
    '--text_length', type=int, help="text tokens of --text_encoder (default: its folder's)"
  )
  parser.add_argument(
    '--text_features_dtype',
    choices=('bfloat16', 'float16'),
    help='dtype of the stored text features (default: bfloat16)',
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    default=64,
    help='number of pictures at once, which does not affect the tokens (default: 64)',
  )
  parser.add_argument(
    '--overwrite',
    action='store_true',
    help='replace splits, and parts of unfinished ones, in the folder that were made with other '
    'settings',
  )
  parser.add_argument(
    '--convert',
    metavar='FOLDER',
    help='convert a token cache of version 1 to version 2, instead of tokenizing',
  )
  distributed.add_arguments(parser)
  distributed.add_worker(parser)


def run(args: argparse.Namespace) -> int:
  """Writes the token cache; returns the exit status."""
  checks.count('--batch_size', args.batch_size)
  if (args.tokenizer is None) == (args.convert is None):
    raise UserError('give --tokenizer=FOLDER or, to convert a token cache, --convert=FOLDER')
  unused = [
    flag
    for flag, given in (
      ('--gin_file', args.gin_file),
      ('--gin', args.gin_bindings),
      ('--dtype', args.dtype),
      ('--views', args.views > 1),
      ('--text_encoder', args.text_encoder),
    )
    if given
  ]
  if args.convert and unused:
    raise UserError(f'--convert keeps the tokens unchanged; omit {unused[0]}')
  if args.text_length is not None:
    checks.count('--text_length', args.text_length)
  if args.text_encoder is None:
    for flag in ('text_length', 'text_features_dtype'):
      if getattr(args, flag) is not None:
        raise UserError(f'--{flag} is of --text_encoder; give both or neither')
  return distributed.share(args, functools.partial(_write, args))


def _write(args: argparse.Namespace, connect: Callable[[], tuple[int, int]], together: bool) -> int:
  # Enter this before importing libraries that start threads, so that they inherit the blocked
  # SIGTERM.
  with preemption.listening(at_once='finished parts are kept'):
    from parti_jax.tokenization import tokenize_jobs

    make = tokenize_jobs.of_old_cache if args.convert else tokenize_jobs.of_source
    jobs, worker, workers = make(args, connect)
    tokenize_jobs.run(jobs, worker, workers, together, args.overwrite)
  return 0
