"""The flags of commands that draw for others, `serve` and `ui`."""

from __future__ import annotations

import argparse
import warnings

from parti_jax.cli import model_flags
from parti_jax.cli import sampling_flags
from parti_jax.core import checks
from parti_jax.core.errors import UserError

_LARGEST_PORT = 65535


def add_arguments(parser: argparse.ArgumentParser, port: int):
  """Adds the flags.

  Args:
    parser: parser of a command.
    port: the default port.
  """
  model_flags.add_arguments(parser)
  parser.add_argument(
    '--host',
    default='127.0.0.1',
    help='address to listen on; 0.0.0.0 lets other machines connect (default: %(default)s)',
  )
  parser.add_argument(
    '--port',
    type=int,
    default=port,
    help='port to listen on; 0 chooses a free one (default: %(default)s)',
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    default=16,
    help='number of pictures to sample at once, for all clients together (default: %(default)s)',
  )
  parser.add_argument(
    '--max_images',
    type=int,
    default=16,
    help='maximum number of pictures in a request (default: %(default)s)',
  )
  parser.add_argument(
    '--queue',
    type=int,
    default=256,
    help='maximum number of pictures that wait; further requests are refused (default: %(default)s)',
  )
  sampling_flags.add_arguments(parser)
  sampling_flags.add_precision(parser)


def check(args: argparse.Namespace) -> None:
  """Checks the flags, before anything slow happens.

  Raises:
    UserError: if a value is invalid; the message names the flag.
  """
  sampling_flags.check_numbers(args, 'batch_size', 'max_images', 'queue')
  sampling_flags.given(args)
  sampling_flags.given_precision(args)
  checks.whole_number('--port', args.port, 0, _LARGEST_PORT)
  if args.queue < args.max_images:
    raise UserError(
      f'--queue={args.queue} is less than --max_images={args.max_images}; no request for so many '
      'pictures could wait'
    )


def service(args: argparse.Namespace, **limits):
  """Loads the model and returns an ImageService, which has drawn one picture.

  Args:
    args: the flags.
    **limits: fields of `image_requests.Limits`, besides those that the flags give.

  Raises:
    UserError: if the model can't be loaded, or can't be sampled with these settings.
  """
  from parti_jax.serving import image_requests
  from parti_jax.serving import image_service

  # Answers say what they leave out of a prompt.
  warnings.filterwarnings('ignore', r'(prompt|text) \d+ is longer than', UserWarning)
  found = image_service.ImageService(
    model_flags.load(args),
    image_requests.Limits(images=args.max_images, queue=args.queue, **limits),
    args.batch_size,
    **sampling_flags.given(args),
  )
  found.warm_up()
  return found
