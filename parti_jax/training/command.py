"""`parti-jax train`: runs the gin-configured training loop."""

from __future__ import annotations

import argparse

from parti_jax import compilation_cache
from parti_jax import config


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax train`."""
  config.add_gin_arguments(parser)
  parser.add_argument('--model_dir', required=True,
                      help='folder of the run; an earlier run in it is resumed')


def run(args: argparse.Namespace) -> int:
  """Trains as gin says; returns the exit status."""
  from parti_jax.training import host_memory  # pylint: disable=g-import-not-at-top
  host_memory.keep_freed()
  from parti_jax.data import tasks  # pylint: disable=unused-import
  from parti_jax.training import configurables  # pylint: disable=unused-import
  from parti_jax.training import train_loop
  config.parse(args.gin_file, args.gin_bindings)
  compilation_cache.enable()
  train_loop.train(args.model_dir)
  return 0
