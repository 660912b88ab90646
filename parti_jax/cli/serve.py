"""`parti-jax serve`: draws for other programs over HTTP, with the API of OpenAI's images endpoints."""

from __future__ import annotations

import argparse

from parti_jax.cli import serving_flags
from parti_jax.core import checks
from parti_jax.core.errors import UserError

_PORT = 8000


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  serving_flags.add_arguments(parser, _PORT)
  parser.add_argument(
    '--max_prompt',
    type=int,
    default=4000,
    metavar='CHARACTERS',
    help='maximum length of a prompt (default: %(default)s)',
  )
  parser.add_argument(
    '--timeout',
    type=float,
    default=600.0,
    metavar='SECONDS',
    help='time limit of a request, including the queue (default: %(default)g)',
  )
  parser.add_argument(
    '--stop_timeout',
    type=float,
    default=60.0,
    metavar='SECONDS',
    help='time limit of accepted requests after SIGTERM or Ctrl-C (default: %(default)g)',
  )


def run(args: argparse.Namespace) -> int:
  """Answers requests until SIGTERM or Ctrl-C, after which accepted requests are finished.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, no model, or an address on which it can't listen.
  """
  serving_flags.check(args)
  checks.count('--max_prompt', args.max_prompt)
  for name in ('timeout', 'stop_timeout'):
    if checks.number(f'--{name}', getattr(args, name), 0) == 0:
      raise UserError(f'--{name}=0 leaves no time; choose a larger number')
  # Before the model is loaded, which takes a moment: the package may be missing, the port taken.
  from parti_jax.serving import addresses
  from parti_jax.serving import http_server

  with addresses.listen(args.host, args.port) as listening:
    service = serving_flags.service(args, prompt=args.max_prompt, seconds=args.timeout)
    url = addresses.url(listening)
    ready = lambda: print(
      f'{service.offer.model} draws at {url}{http_server.GENERATIONS}', flush=True
    )
    http_server.serve(service, listening, args.stop_timeout, ready)
  return 0
