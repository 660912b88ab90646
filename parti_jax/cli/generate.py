"""`parti-jax generate`: generates pictures for prompts and writes them as PNG files."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import warnings

from parti_jax.cli import model_flags
from parti_jax.cli import sampling_flags
from parti_jax.core import garbage
from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_files

DEFAULT_OUTPUT_DIR = 'parti_jax_pictures'
# `run` resumes the search for garbage, which `main` pauses.
SHORT = True


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument(
    'prompts',
    nargs='*',
    metavar='PROMPT',
    help='description of a picture, such as "waving hand: dark skin tone"',
  )
  parser.add_argument(
    '--prompts_file', metavar='FILE', help='a text file with more prompts, one on each line'
  )
  model_flags.add_arguments(parser)
  parser.add_argument(
    '--output_dir',
    default=DEFAULT_OUTPUT_DIR,
    metavar='DIR',
    help='output folder of the pictures (default: ./%(default)s)',
  )
  parser.add_argument(
    '--num_images',
    type=int,
    default=4,
    help='number of pictures for each prompt (default: %(default)s)',
  )
  parser.add_argument(
    '--rank',
    action='store_true',
    help='sort the pictures of each prompt with the ranker, best first; the paper ranks 16. Implied by '
    '--ranker',
  )
  parser.add_argument(
    '--upscale',
    action='store_true',
    help='enlarge the pictures with the super-resolution. Implied by --upscaler',
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='seed of the pictures (default: %(default)s)'
  )
  _add_steering(parser)
  sampling_flags.add_arguments(parser)
  sampling_flags.add_precision(parser)
  parser.add_argument(
    '--batch_size',
    type=int,
    help='number of pictures to generate at once; affects memory, not the pictures',
  )
  parser.add_argument(
    '--display_size',
    type=int,
    metavar='PIXELS',
    help='height of each picture on the grid (default: its own, enlarged if small)',
  )


def _add_steering(parser: argparse.ArgumentParser):
  """Adds the flags that steer pictures, besides their prompts."""
  parser.add_argument(
    '--image', metavar='FILE', help='a picture to edit, with one of --mask, --keep and --vary'
  )
  parser.add_argument(
    '--mask',
    metavar='FILE',
    help='the part of --image to redraw: a picture of its size that is transparent there, or white',
  )
  parser.add_argument(
    '--keep',
    metavar='SIDE:SHARE',
    help='the part of --image to keep, such as top:0.5; the sides are top, bottom, left and right',
  )
  parser.add_argument(
    '--vary',
    type=float,
    metavar='SHARE',
    help='the share of the image tokens of --image to redraw, at random places',
  )
  parser.add_argument(
    '--best_of',
    type=int,
    default=1,
    metavar='N',
    help='draw this many candidates of each edited picture, and keep the one that best fits the kept '
    'image tokens after the hole (default: %(default)s)',
  )
  parser.add_argument(
    '--negative',
    metavar='TEXT',
    help='what the pictures should not show; replaces the empty text in guidance',
  )
  parser.add_argument(
    '--prompt_weights',
    action='store_true',
    help=r"read weights of words in the prompts, such as '(red hat:1.5)'; \( and \) are parentheses",
  )


def run(args: argparse.Namespace) -> int:
  """Generates and writes the pictures and their grid, and prints the file names.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, no prompt, no model, or a folder that can't be written.
  """
  prompts = _prompts(args)
  _check_flags(args)
  model = model_flags.load(args)
  garbage.resume()
  with warnings.catch_warnings():
    warnings.simplefilter('always', UserWarning)
    warnings.showwarning = _print_warning
    result = model.generate(
      prompts,
      num_images=args.num_images,
      seed=args.seed,
      batch_size=args.batch_size,
      progress=True,
      rank=args.rank or args.ranker is not None,
      upscale=args.upscale or args.upscaler is not None,
      image=args.image,
      mask=args.mask,
      keep=args.keep,
      vary=args.vary,
      best_of=args.best_of,
      negative=args.negative,
      prompt_weights=args.prompt_weights,
      **sampling_flags.given(args),
    )
  for path in result.save(args.output_dir):
    print(path)
  print(result.save_grid(args.output_dir, args.display_size))
  if result.usage is not None:
    print(f'parti-jax: {result.usage.summary(model.decoder_layers)}', file=sys.stderr)
  if result.passes is not None:
    print(f'parti-jax: {result.passes.summary(result.tokens.shape[-1])}', file=sys.stderr)
  garbage.end()
  return 0


def _print_warning(message, *unused_args, **unused_kwargs):
  print(f'parti-jax: warning: {message}', file=sys.stderr)


def _prompts(args: argparse.Namespace) -> list[str]:
  """Returns the prompts of the command line, then the file's lines that aren't blank."""
  prompts = list(args.prompts)
  if args.prompts_file is not None:
    prompts += read_prompts(args.prompts_file)
  if not prompts:
    raise UserError(
      'no prompt: give one, such as "waving hand: dark skin tone", or --prompts_file FILE'
    )
  for number, prompt in enumerate(prompts, 1):
    if not prompt.strip():
      raise UserError(f'prompt {number} is empty; say what the picture should show')
  return prompts


def read_prompts(path: str) -> list[str]:
  """Returns the lines of a --prompts_file that aren't blank.

  Raises:
    UserError: if the file can't be read, or has no such lines.
  """
  text = text_files.read(path, f'--prompts_file {path}')
  lines = [line.strip() for line in text_files.lines(text) if line.strip()]
  if not lines:
    raise UserError(f'--prompts_file {path} contains no prompt')
  return lines


def _check_flags(args: argparse.Namespace):
  """Raises UserError for invalid flags, before anything slow happens."""
  sampling_flags.check_numbers(args, 'num_images', 'batch_size', 'display_size', 'best_of')
  sampling_flags.given(args)
  sampling_flags.given_precision(args)
  folder = pathlib.Path(args.output_dir)
  existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  if not existing.is_dir():
    raise UserError(f'--output_dir {existing} is a file; choose a folder')
  if not os.access(existing, os.W_OK | os.X_OK):
    raise UserError(f'--output_dir {folder}: cannot write there; choose another folder')
