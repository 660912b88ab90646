"""Connects the processes of a multi-host run and explains why one of them ended.

Each process runs the same command. On a TPU pod and under Slurm, JAX finds the others by itself.
Anywhere else the flags give the address of process 0, the coordinator.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.runs import supervisor

# Seconds without a heartbeat until a process counts as dead, and seconds that processes wait for
# each other at the end.
HEARTBEAT_TIMEOUT = 30
_AGAIN = 'start all processes again to resume'


@dataclasses.dataclass(frozen=True)
class Processes:
  """The processes of a run, from flags or the environment.

  Attributes:
    coordinator: HOST:PORT of process 0; None if JAX finds the processes by itself.
    num_processes: number of processes; None if JAX finds them by itself.
    process_id: index of this process, from 0; None if JAX finds the processes by itself.
    timeout: seconds to wait for the other processes at the start.
  """

  coordinator: str | None
  num_processes: int | None
  process_id: int | None
  timeout: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that select the processes of a multi-host run."""
  group = parser.add_argument_group(
    'multiple hosts',
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
    help='elsewhere: an address of process 0 that all hosts can reach, with a free port',
  )
  group.add_argument('--num_processes', type=int, metavar='N', help='number of processes')
  group.add_argument(
    '--process_id',
    type=int,
    metavar='I',
    help='index of this process, 0 to N-1; must differ on every host',
  )
  group.add_argument(
    '--connect_timeout',
    type=int,
    default=300,
    metavar='SECONDS',
    help='how long to wait for the other processes at the start (default: %(default)s)',
  )


def processes(args: argparse.Namespace) -> Processes | None:
  """Returns the processes of a multi-host run; None if this process trains alone.

  Args:
    args: parsed flags of `add_arguments`.

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
      '--multi_host finds the processes itself; drop either it or '
      '--coordinator, --num_processes and --process_id'
    )
  if missing:
    raise errors.UserError(
      f'{" and ".join(missing)} not given; --coordinator=HOST:PORT, '
      '--num_processes=N and --process_id=I must be given together'
    )
  host, _, port = args.coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise errors.UserError(
      f'--coordinator={args.coordinator} must be HOST:PORT, such as 10.0.0.1:8476'
    )
  if args.num_processes < 1:
    raise errors.UserError(f'--num_processes={args.num_processes} must be at least 1')
  checks.count('--num_processes', args.num_processes)
  if not 0 <= args.process_id < args.num_processes:
    raise errors.UserError(
      f'--process_id={args.process_id} must be 0 to '
      f'{args.num_processes - 1} with --num_processes={args.num_processes}'
    )
  return Processes(**given, timeout=args.connect_timeout)


def add_worker(parser: argparse.ArgumentParser) -> None:
  """Adds the flag of a process that works independently of the others."""
  parser.add_argument(
    '--worker',
    metavar='I/N',
    help='do the share with index I, from 0, of N independent processes, which may run in any order',
  )


def worker(args: argparse.Namespace) -> tuple[int, int] | None:
  """Returns (index, number) of independent processes; None if --worker is not given.

  Raises:
    UserError: the flag is malformed, or excluded by those of a multi-host run.
  """
  if args.worker is None:
    return None
  together = ('multi_host', 'coordinator', 'num_processes', 'process_id')
  given = [
    name
    for name in together
    if getattr(args, name) is not None and getattr(args, name) is not False
  ]
  if given:
    raise errors.UserError(f'--worker is for independent processes; drop either it or --{given[0]}')
  match = re.fullmatch(r'(\d{1,9})/(\d{1,9})', args.worker)
  if not match or int(match[1]) >= int(match[2]):
    raise errors.UserError(f'--worker={args.worker} must be I/N with I from 0 to N-1, such as 0/4')
  return int(match[1]), int(match[2])


def connect(found: Processes) -> None:
  """Connects to the other processes; call it before any device is used.

  If the coordinator can't be reached, the runtime ends this process; `explanation` then says why.

  Args:
    found: the result of `processes`.

  Raises:
    UserError: the environment names no other processes, the coordinator's port is taken, or the
      processes disagree about their number.
  """
  import jax

  timeouts: dict[str, Any] = {
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
      f'{found.coordinator} has {jax.process_count()}; give every process the same number'
    )


def check_connected() -> None:
  """Raises UserError if there are other processes and `connect` hasn't been called."""
  import jax

  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise errors.UserError(
      f'the devices here belong to {jax.process_count()} processes; run '
      'the command on every host with --multi_host'
    )


@contextlib.contextmanager
def losses_reported() -> Iterator[None]:
  """After a failed collective, waits for the runtime, which knows which process is missing.

  Without this the process would end at once with the message of a broken connection.
  """
  import jax

  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    # These two are always failures of this process itself.
    if not any(word in str(error) for word in ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT')):
      print(
        f'parti-jax: a step failed: {str(error).splitlines()[0]}; waiting {HEARTBEAT_TIMEOUT} s '
        'to see whether another process is lost, and which',
        file=sys.stderr,
      )
      time.sleep(HEARTBEAT_TIMEOUT + 15)
    raise


def explanation(found: Processes, watched: supervisor.WatchedProcess, words: str) -> str:
  """Returns a line that says why the runtime ended this process, and what to do.

  Args:
    found: the result of `processes`.
    watched: knows whether this process had connected to the others.
    words: the runtime's last output.
  """
  if watched.connected:
    return f'{_who_is_missing(words)}; {_AGAIN}'
  where = f'the coordinator {found.coordinator}' if found.coordinator else 'the coordinator'
  if 'ALREADY_EXISTS' in words:
    return (
      f'{where}: another process has the same --process_id={found.process_id}; it must differ for '
      'each process'
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
      f'not all of the {found.num_processes} processes connected to {where} within '
      f'{found.timeout} s (--connect_timeout); start the command once for each --process_id'
    )
  return (
    f'{where} did not answer within {found.timeout} s (--connect_timeout): check the '
    'address, that process 0 and all others have started, and that the port is open'
  )


def _several_found(environment) -> bool:
  """Returns whether the environment is that of one process of several."""
  tasks = environment.get('SLURM_STEP_NUM_TASKS', '1')
  hosts = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
  return (tasks.isdecimal() and int(tasks) > 1) or len(hosts) > 1


def _who_is_missing(words: str) -> str:
  # The runtime lists the numbers of the dead processes on a separate line.
  found = re.search(r'unhealthy \(stopped sending heartbeats\):\s*\n([\d, \n]+)', words)
  if found:
    dead = ', '.join(re.findall(r'\d+', found.group(1)))
    return f"process {dead} of this run died or can't be reached"
  if 'Failed to send RPC to coordination service' in words:
    return "process 0 of this run, the coordinator, died or can't be reached"
  return f'another process of this run ended ({_status(words)})'


def _status(words: str) -> str:
  """Returns the runtime's reason in one line."""
  found = re.search(r'absl::Status: (.*?)(\n\n|\nRPC|\n\*\*\*|\Z)', words, re.DOTALL)
  return ' '.join(found.group(1).split())[:300] if found else 'no reason given'


def share(
  args: argparse.Namespace, work: Callable[[Callable[[], tuple[int, int]], bool], int]
) -> int:
  """Does work that independent processes, or the processes of a multi-host run, share.

  Args:
    args: the flags of `add_arguments` and `add_worker`.
    work: does this process' share, given a function that connects to the other processes and returns
      the index of this one and their number, and whether they wait for each other; returns the exit
      status.

  Returns:
    The exit status, or that of a process of a multi-host run that failed.
  """
  independent = worker(args)
  found = None if independent else processes(args)
  if found is None:
    return work(lambda: independent or (0, 1), False)
  watched = supervisor.WatchedProcess()
  status = watched.fork(functools.partial(explanation, found, watched))
  if status is not None:
    return status

  def connect_all() -> tuple[int, int]:
    import jax

    connect(found)
    watched.connect()
    return jax.process_index(), jax.process_count()

  with watched.failures():
    return work(connect_all, True)
