"""`parti-jax compare`: compares two measurements, if they were made by the same protocol."""

from __future__ import annotations

import argparse

from parti_jax.evaluation import measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  parser.add_argument('first', metavar='A.json', help='a measurement.json')
  parser.add_argument('second', metavar='B.json', help='another one')


def run(args: argparse.Namespace) -> int:
  """Prints the numbers side by side.

  Returns:
    0, the exit status.

  Raises:
    UserError: a file can't be read, or the protocols differ; the message names the entries.
  """
  print(measurement.compare((args.first, args.second)).text())
  return 0
