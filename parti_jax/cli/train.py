"""`parti-jax train`: runs the gin-configured training loop."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from parti_jax.core import compilation_cache
from parti_jax.core import gin_config
from parti_jax.runs import distributed
from parti_jax.runs import preemption
from parti_jax.runs import supervisor


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax train`."""
  gin_config.add_gin_arguments(parser)
  parser.add_argument(
    '--model_dir',
    required=True,
    help='folder of the run, which all hosts share; an earlier run in it is resumed',
  )
  distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Trains as gin says; returns the exit status."""
  found = distributed.processes(args)
  if found is None:
    _train(args, lambda: None)
    return 0
  watched = supervisor.WatchedProcess()
  status = watched.fork(functools.partial(distributed.explanation, found, watched))
  if status is not None:
    return status

  def connect():
    distributed.connect(found)
    watched.connect()

  with watched.failures(), distributed.losses_reported():
    _train(args, connect)
  return 0


def _train(args: argparse.Namespace, connect: Callable[[], None]) -> None:
  """Parses the gin configuration, connects to the other processes and trains."""
  # Before the imports, so that SIGTERM is also blocked in the threads that they start.
  with preemption.listening():
    from parti_jax.runs import allocator

    allocator.keep_freed()
    from parti_jax.checkpoints import disk_errors
    from parti_jax.core import numerics
    from parti_jax.training import configurables  # noqa: F401
    from parti_jax.training import train_loop

    gin_config.parse(args.gin_file, args.gin_bindings)
    connect()
    compilation_cache.enable()
    with disk_errors.reported(args.model_dir), numerics.fixed():
      train_loop.train(args.model_dir)
