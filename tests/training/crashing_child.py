"""Runs `parti-jax train` with a deliberate error, for test_crashes.py.

Usage: crashing_child.py WHERE PROCESS train ...

WHERE is a key of `_ERRORS`; PROCESS is the number of the process that gets the error. Except
for 'step_with_full_buffers', decoding is slow, so that the data threads are always busy.
"""

import sys
import time

from parti_jax.cli import main


def _raise(*_, **__):
  raise RuntimeError('injected')


def _after(calls, function):
  """Wraps `function` to raise an error after some calls."""
  left = [calls]

  def called(*args, **kwargs):
    left[0] -= 1
    return function(*args, **kwargs) if left[0] >= 0 else _raise()

  return called


def _step(lib):
  lib['trainer'].Trainer.step = _after(2, lib['trainer'].Trainer.step)


def _step_with_full_buffers(lib):
  step = lib['trainer'].Trainer.step

  def slow(*args, **kwargs):
    time.sleep(2)
    return step(*args, **kwargs)

  lib['trainer'].Trainer.step = _after(2, slow)


def _step_of_jax(lib):
  """Raises an error of JAX itself in the compiled step."""
  import jax

  step = lib['trainer'].Trainer.step

  def bad(*args, **kwargs):
    jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(_raise, x, x))(1.0))
    return step(*args, **kwargs)

  lib['trainer'].Trainer.step = bad


def _evaluation(lib):
  lib['trainer'].Trainer.evaluate = lambda *args: (next(args[2]), _raise())


def _pictures(lib):
  lib['trainer'].Trainer.pictures = _raise


def _data_thread(lib):
  lib['decoding'].decode_and_note = _after(20, lib['decoding'].decode_and_note)


def _reader(lib):
  lib['sources'].storage.open_file = _after(20, lib['sources'].storage.open_file)


_ERRORS = {
  'step': _step,
  'step_with_full_buffers': _step_with_full_buffers,
  'step_of_jax': _step_of_jax,
  'evaluation': _evaluation,
  'pictures': _pictures,
  'data_thread': _data_thread,
  'reader': _reader,
}


def _patch(where):
  from parti_jax.data import image_decoding
  from parti_jax.data import sources
  from parti_jax.training import trainer

  if where != 'step_with_full_buffers':
    decode = image_decoding.decode_and_note

    def slow(*args, **kwargs):
      time.sleep(0.1)
      return decode(*args, **kwargs)

    image_decoding.decode_and_note = slow
  _ERRORS[where]({'trainer': trainer, 'decoding': image_decoding, 'sources': sources})


if __name__ == '__main__':
  where_, process, *argv = sys.argv[1:]
  from parti_jax.cli import train as train_lib

  train = train_lib._train

  def patched_train(args, connect):
    """Patches the training process, not its parent."""
    if (args.process_id or 0) == int(process):
      _patch(where_)
    train(args, connect)

  train_lib._train = patched_train
  sys.argv[1:] = argv
  sys.exit(main.main())
