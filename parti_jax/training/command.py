"""`parti-jax train`: runs the gin-configured training loop."""

from __future__ import annotations

import argparse
import functools

from parti_jax import compilation_cache
from parti_jax import config
from parti_jax.training import hosts
from parti_jax.training import preemption
from parti_jax.training import watched_process


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax train`."""
  config.add_gin_arguments(parser)
  parser.add_argument('--model_dir', required=True,
                      help='folder of the run, which all hosts share; an earlier run in it is '
                      'resumed')
  hosts.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Trains as gin says; returns the exit status."""
  found = hosts.processes(args)
  if found is None:
    _train(args, lambda: None)
    return 0
  watched = watched_process.WatchedProcess()
  status = watched.fork(functools.partial(hosts.explanation, found, watched))
  if status is not None:
    return status

  def connect():
    hosts.connect(found)
    watched.connect()

  with watched.failures(), hosts.losses_told():
    _train(args, connect)
  return 0


def _train(args: argparse.Namespace, connect):
  # Before what starts threads is imported, so that it blocks SIGTERM in them too.
  with preemption.listening():
    _train_listening(args, connect)


def _train_listening(args: argparse.Namespace, connect):
  from parti_jax.training import host_memory  # pylint: disable=g-import-not-at-top
  host_memory.keep_freed()
  from parti_jax import numerics
  from parti_jax.data import mixtures  # pylint: disable=unused-import
  from parti_jax.training import configurables  # pylint: disable=unused-import
  from parti_jax.training import full_disk
  from parti_jax.training import train_loop
  config.parse(args.gin_file, args.gin_bindings)
  connect()
  compilation_cache.enable()
  with full_disk.told(args.model_dir), numerics.fixed():
    train_loop.train(args.model_dir)
