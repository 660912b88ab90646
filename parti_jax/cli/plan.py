"""`parti-jax plan`: compiles a step for other devices and reports what limits its speed."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import storage
from parti_jax.exported_model import sampling_settings


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax plan`."""
  gin_config.add_gin_arguments(parser)
  parser.add_argument(
    '--topology',
    metavar='KIND:SIZES',
    help='v4:8x8x8, v5e:16x16, v5p:8x8x8, v6e:16x16 or tpu7x:4x4x4; 2xv5p:8x8x8 '
    'for two slices; cpu:8 for eight emulated devices',
  )
  parser.add_argument(
    '--what',
    choices=('train', 'sample'),
    default='train',
    help='the training step, or the step that samples one image token with a full '
    'cache (default: %(default)s)',
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    help='examples of a training step (default: train.batch_size), or images of '
    'a sampling step (default: 32)',
  )
  parser.add_argument(
    '--unguided',
    action='store_true',
    help='sample without classifier-free guidance, with one sequence per image instead of two',
  )
  parser.add_argument(
    '--weights',
    default='float',
    metavar='NAME',
    help="how sampling holds the decoder's weights: float, in the dtype of the computation, or int8 "
    '(default: %(default)s)',
  )
  parser.add_argument(
    '--cache',
    default='float',
    metavar='NAME',
    help='how sampling holds keys and values: float, in the dtype of the computation, or int8 '
    '(default: %(default)s)',
  )
  parser.add_argument(
    '--json',
    metavar='FILE',
    help='write the plan to this file as JSON; with --search, write a line for each '
    'candidate, and skip candidates that the file already has',
  )
  parser.add_argument(
    '--traffic',
    type=int,
    nargs='?',
    const=20,
    default=0,
    metavar='N',
    help='also print the N modules and passes that move the most bytes between the chip and its '
    'main memory (default without N: %(const)s)',
  )
  parser.add_argument(
    '--search',
    action='store_true',
    help="try meshes, remat policies and microbatches, then other options of XLA's compiler on the "
    'best of them, and print those that fit',
  )
  parser.add_argument(
    '--search_limit',
    type=int,
    default=12,
    metavar='N',
    help='maximum number of candidates to compile (default: %(default)s)',
  )
  parser.add_argument(
    '--table',
    nargs='+',
    metavar='FILE',
    help='print plans that --json wrote as one table, without compiling',
  )


def run(args: argparse.Namespace) -> int:
  """Plans; returns 0 if the step fits, 1 if not."""
  from parti_jax.planning import report

  if args.table:
    print(report.table([read(file) for file in args.table]))
    return 0
  if not args.topology:
    raise errors.UserError('--topology is required, such as --topology=v4:8x8x8')
  for name in ('batch_size', 'search_limit'):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise errors.UserError(f'--{name}={getattr(args, name)} must be at least 1')
    if getattr(args, name) is not None:
      checks.count(f'--{name}', getattr(args, name))
  if args.traffic < 0:
    raise errors.UserError(f'--traffic={args.traffic} must be at least 0')
  sampling_settings.check_weights(args.weights)
  sampling_settings.check_cache(args.cache)
  for name in ('weights', 'cache'):
    if getattr(args, name) != 'float' and args.what != 'sample':
      raise errors.UserError(f'--{name}={getattr(args, name)} only applies to --what=sample')
  from parti_jax.planning import plan as plan_lib
  from parti_jax.planning import request as request_lib
  from parti_jax.planning import search

  request = request_lib.Request(
    args.what,
    args.topology,
    tuple(args.gin_file),
    tuple(args.gin_bindings),
    args.batch_size,
    not args.unguided,
    args.weights,
    args.cache,
  )
  if args.search:
    return search.run(request, args.search_limit, args.json)
  if args.json:
    try:
      pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise errors.UserError(f'--json={args.json}: {error.strerror}') from error
  print(f'compiling for {args.topology}; this takes minutes for a large model', file=sys.stderr)
  plan = plan_lib.make(request)
  print(report.text(plan, args.traffic), flush=True)
  if args.json:
    storage.write(args.json, json.dumps(plan, indent=2) + '\n')
  return 0 if plan['fits'] else 1


def read(file: str) -> dict:
  """Reads a plan that `--json` wrote.

  Raises:
    UserError: if the file isn't such a plan.
  """
  from parti_jax.planning import plan as plan_lib

  try:
    with open(file, encoding='utf-8') as opened:
      plan = json.load(opened)
  except (OSError, ValueError) as error:
    raise errors.UserError(f'{file}: not a plan: {error}') from error
  if not isinstance(plan, dict) or plan.get('schema') != plan_lib.SCHEMA:
    raise errors.UserError(
      f'{file}: not a plan of schema {plan_lib.SCHEMA}; make it again with parti-jax plan --json'
    )
  return plan
