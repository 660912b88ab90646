"""Training by several processes: who they are, how they meet, and what ends them.

Each process runs the same command. On a TPU pod and under Slurm JAX finds the others by itself;
anywhere else the flags say where process 0, the coordinator, listens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.runs import supervisor

# Seconds without a sign of life until a process counts as dead, and until those that wait at the
# end give up on the others.
HEARTBEAT_TIMEOUT = 30
_AGAIN = 'start all processes again to go on'


@dataclasses.dataclass(frozen=True)
class Processes:
  """The processes of a run, as flags or the surroundings give them.

  Attributes:
    coordinator: HOST:PORT of process 0; None where JAX finds everything itself.
    num_processes: how many there are; None as above.
    process_id: which one this is, from 0; None as above.
    timeout: seconds to wait for the others at the start.
  """

  coordinator: str | None
  num_processes: int | None
  process_id: int | None
  timeout: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say which processes train together."""
  group = parser.add_argument_group(
    'many hosts',
    'Every host runs the same command. Under srun with several tasks, and where '
    'TPU_WORKER_HOSTNAMES names several hosts, as on GKE, no flag is needed.',
  )
  group.add_argument(
    '--multi_host',
    action='store_true',
    help='find the other processes as JAX does on TPU pods, Slurm and Open MPI',
  )
  group.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help='elsewhere: an address of process 0 that all can reach, a free port',
  )
  group.add_argument('--num_processes', type=int, metavar='N', help='how many processes train')
  group.add_argument(
    '--process_id', type=int, metavar='I', help='which one this is, 0 to N-1; each has another'
  )
  group.add_argument(
    '--connect_timeout',
    type=int,
    default=300,
    metavar='SECONDS',
    help='how long to wait for the others at the start (default: %(default)s)',
  )


def processes(args: argparse.Namespace) -> Processes | None:
  """The processes that train together; None for this one alone.

  Args:
    args: with the flags of `add_arguments`.

  Raises:
    UserError: flags are missing, contradict each other or are out of range.
  """
  given = {name: getattr(args, name) for name in ('coordinator', 'num_processes', 'process_id')}
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if args.connect_timeout < 1:
    raise errors.UserError(f'--connect_timeout={args.connect_timeout} must be at least 1')
  checks.count('--connect_timeout', args.connect_timeout)
  if len(missing) == len(given):
    if not args.multi_host and not _several_found(os.environ):
      return None
    return Processes(None, None, None, args.connect_timeout)
  if args.multi_host:
    raise errors.UserError(
      '--multi_host finds the processes itself; leave away either it or '
      '--coordinator, --num_processes and --process_id'
    )
  if missing:
    raise errors.UserError(
      f'{" and ".join(missing)} not given; --coordinator=HOST:PORT, '
      '--num_processes=N and --process_id=I go together'
    )
  host, _, port = args.coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise errors.UserError(
      f'--coordinator={args.coordinator} is no HOST:PORT, such as 10.0.0.1:8476'
    )
  if args.num_processes < 1:
    raise errors.UserError(f'--num_processes={args.num_processes} must be at least 1')
  checks.count('--num_processes', args.num_processes)
  if not 0 <= args.process_id < args.num_processes:
    raise errors.UserError(
      f'--process_id={args.process_id} must be 0 to '
      f'{args.num_processes - 1}, since --num_processes={args.num_processes}'
    )
  return Processes(**given, timeout=args.connect_timeout)


def connect(found: Processes) -> None:
  """Meets the other processes; call it before any device is touched.

  Args:
    found: of `processes`.

  Raises:
    UserError: the surroundings tell nothing of other processes, the coordinator's port is taken,
      or processes differ in their number. Where the runtime ends the process instead, such as
      for a coordinator that can't be reached, see `explanation`.
  """
  import jax

  timeouts = {
    'initialization_timeout': found.timeout,
    'heartbeat_timeout_seconds': HEARTBEAT_TIMEOUT,
    'shutdown_timeout_seconds': HEARTBEAT_TIMEOUT,
  }
  try:
    if found.coordinator is None:
      jax.distributed.initialize(**timeouts)
    else:
      jax.distributed.initialize(
        found.coordinator,
        found.num_processes,
        found.process_id,
        cluster_detection_method='deactivate',
        **timeouts,
      )
  except (ValueError, RuntimeError) as error:
    reason = str(error).splitlines()[0]
    if found.coordinator is None:
      raise errors.UserError(
        f'--multi_host: JAX finds no other processes here ({reason}); give '
        '--coordinator=HOST:PORT --num_processes=N --process_id=I'
      ) from error
    raise errors.UserError(f'--coordinator={found.coordinator}: {reason}') from error
  if found.num_processes not in (None, jax.process_count()):
    raise errors.UserError(
      f'--num_processes={found.num_processes}, but the coordinator '
      f'{found.coordinator} has {jax.process_count()}; give all the same'
    )


def check_connected() -> None:
  """Raises UserError if there are other processes that this one has not met by `connect`."""
  import jax

  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise errors.UserError(
      f'the devices here are those of {jax.process_count()} processes; run '
      'the command on every host with --multi_host'
    )


@contextlib.contextmanager
def losses_told() -> Iterator[None]:
  """After a failed collective, leaves the end to the runtime, which knows who is missing.

  Without this the process would end at once with the text of a broken connection.
  """
  import jax

  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    # These are this process's own failures for certain.
    if not any(word in str(error) for word in ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT')):
      print(
        f'parti-jax: a step failed: {str(error).splitlines()[0]}; whether another process is '
        f'lost, and which, shows within {HEARTBEAT_TIMEOUT} s',
        file=sys.stderr,
      )
      time.sleep(HEARTBEAT_TIMEOUT + 15)
    raise


def explanation(found: Processes, watched: supervisor.WatchedProcess, words: str) -> str:
  """Says why the runtime ended this process, and what to do.

  Args:
    found: of `processes`.
    watched: knows how far the process had come.
    words: what the runtime wrote.
  """
  if watched.connected:
    return f'{_who_is_missing(words)}; {_AGAIN}'
  where = f'the coordinator {found.coordinator}' if found.coordinator else 'the coordinator'
  if 'ALREADY_EXISTS' in words:
    return (
      f'{where}: another process has the same --process_id={found.process_id}; each needs its own'
    )
  if 'Unexpected task' in words:
    return (
      f'{where} was started for fewer processes than --process_id={found.process_id} needs; '
      'give every process the same --num_processes'
    )
  if 'DEADLINE_EXCEEDED' not in words:
    return f'{where} refused this process: {_status(words)}'
  if found.process_id == 0:
    return (
      f'not all of the {found.num_processes} processes came to {where} within '
      f'{found.timeout} s (--connect_timeout); start the command once for each --process_id'
    )
  return (
    f'{where} did not answer within {found.timeout} s (--connect_timeout): check the '
    'address, that process 0 and all others are started, and that the port is open'
  )


def _several_found(environment) -> bool:
  """Whether the surroundings are those of one process of several."""
  tasks = environment.get('SLURM_STEP_NUM_TASKS', '1')
  hosts = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
  return (tasks.isdecimal() and int(tasks) > 1) or len(hosts) > 1


def _who_is_missing(words: str) -> str:
  # The runtime lists the numbers of the dead on a line of their own.
  found = re.search(r'unhealthy \(stopped sending heartbeats\):\s*\n([\d, \n]+)', words)
  if found:
    dead = ', '.join(re.findall(r'\d+', found.group(1)))
    return f"process {dead} of this run died or can't be reached"
  if 'Failed to send RPC to coordination service' in words:
    return "process 0 of this run, the coordinator, died or can't be reached"
  return f'another process of this run ended ({_status(words)})'


def _status(words: str) -> str:
  """The runtime's reason in one line."""
  found = re.search(r'absl::Status: (.*?)(\n\n|\nRPC|\n\*\*\*|\Z)', words, re.DOTALL)
  return ' '.join(found.group(1).split())[:300] if found else 'no reason given'
