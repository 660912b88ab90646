"""Runs `parti-jax train` for test_many_hosts.py: records it, and kills or stops it on demand.

Usage: many_hosts_child.py RECORD VICTIM SIGNAL STEP train ...

Writes the printed metrics and digests of the state to RECORD, as JSON lines. The process
VICTIM kills itself (SIGNAL KILL) or has its parent pass SIGTERM on (SIGNAL TERM) after STEP.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np

from parti_jax.cli import main


def digest(run):
  """Returns a hexadecimal digest of all arrays of a run's state on all processes."""
  import jax

  everywhere = jax.sharding.NamedSharding(
    run.state.step.sharding.mesh, jax.sharding.PartitionSpec()
  )
  whole = jax.jit(lambda state: state, out_shardings=everywhere)(run.state)
  leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(np.asarray, whole))
  parts = [jax.tree_util.keystr(path).encode() + leaf.tobytes() for path, leaf in leaves]
  return hashlib.sha256(b''.join(parts)).hexdigest()


def patch(record, is_victim, signal_name, at_step):
  """Makes the loop record its work, and kills the victim."""
  from parti_jax.training import reporting
  from parti_jax.training import run as run_lib

  advance, init, save = (run_lib.Run.advance, run_lib.Run.__init__, run_lib.Run.save)

  def write(**values):
    with open(record, 'a', encoding='utf-8') as file:
      file.write(json.dumps(values) + '\n')

  def places(run):
    shares = run._examples.state()['shares']
    return [[share['epoch'], share['taken'] + share['lost']] for share in shares]

  def recorded_init(run, trainer, model_dir, *args, **kwargs):
    init(run, trainer, model_dir, *args, **kwargs)
    run.folder = pathlib.Path(model_dir) / 'checkpoints'
    write(begins=run.step, digest=digest(run), places=places(run))

  def recorded_save(run, last=False):
    write(saves=run.step, digest=digest(run), places=places(run))
    save(run, last)

  def recorded_advance(run):
    if is_victim and run.step == at_step:
      if signal_name == 'KILL':
        while not any(path.name.isdecimal() for path in run.folder.iterdir()):
          time.sleep(0.1)  # A checkpoint is being written.
        os.kill(os.getpid(), signal.SIGKILL)
      os.kill(os.getppid(), signal.SIGTERM)
    return advance(run)

  run_lib.Run.__init__ = recorded_init
  run_lib.Run.save, run_lib.Run.advance = recorded_save, recorded_advance
  reporting.Reporter.metrics = lambda _, step, values: write(step=step, **values)


if __name__ == '__main__':
  record_file, victim, signal_, step, *argv = sys.argv[1:]
  from parti_jax.cli import train as train_lib

  train = train_lib._train

  def patched_train(args, connect):
    """Patches only the child, since the parent must not import JAX."""
    patch(record_file, args.process_id == int(victim), signal_, int(step))
    train(args, connect)

  train_lib._train = patched_train
  sys.exit(main.main(argv))
