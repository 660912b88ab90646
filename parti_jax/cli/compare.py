"""`parti-jax compare`: compares two measurements, if they were made by the same protocol."""

from __future__ import annotations

import argparse

from parti_jax.evaluation import measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  parser.add_argument(
    'first',
    metavar='A.json',
    help='a measurement.json, or a report.json, sweep.json or rejection.json, of which FILE#NAME chooses '
    'one measurement; without a choice, those of the same names are compared',
  )
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
