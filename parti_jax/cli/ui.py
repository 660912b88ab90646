"""`parti-jax ui`: a page in the browser, on which pictures appear row by row."""

from __future__ import annotations

import argparse

from parti_jax.cli import serving_flags

_PORT = 7860


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  serving_flags.add_arguments(parser, _PORT)


def run(args: argparse.Namespace) -> int:
  """Shows the page until SIGTERM or Ctrl-C.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, no model, or an address on which it can't listen.
  """
  serving_flags.check(args)
  # Before the model is loaded, which takes a moment: the package may be missing, the port taken.
  from parti_jax.serving import addresses
  from parti_jax.serving.ui import page

  with addresses.listen(args.host, args.port) as listening:
    port = listening.getsockname()[1]
    service = serving_flags.service(args)
  try:
    with page.shown(service, args.host, port) as url:
      print(f'{service.offer.model} draws at {url}', flush=True)
      page.wait_for_signal()
  finally:
    service.close(cancel=True)
  return 0
