"""What t5x's checkpoints were trained with: a file beside them, which t5x knows nothing of.

`inputs.json` in t5x's MODEL_DIR has the fingerprints of the vocabulary and of the tokenizer. It is
written when training begins, or by `parti-jax t5x_checkpoint`, and compared whenever a checkpoint
and a task come together. See `parti_jax.core.fingerprints`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import gin
import jax

from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core.errors import UserError

FILE = 'inputs.json'
_LARGEST = 1 << 16
# Macros of t5x's gin files that name a checkpoint, `.../checkpoint_<step>` or a folder of them.
_CHECKPOINTS = ('INITIAL_CHECKPOINT_PATH', 'CHECKPOINT_PATH')
_REMEDIES = {
  'vocabulary': 'set vocabulary.path to the one that it was trained with',
  'tokenizer': 'set token_cache.path to tokens of the one that it was trained with',
}
_ALLOW = 'if it is meant, set check_inputs.allow_mismatch=True'


def of_checkpoint(path) -> dict[str, str | None]:
  """Returns {kind: digits} of a checkpoint of t5x; nothing if it does not say.

  Args:
    path: the checkpoint's folder or its MODEL_DIR, a path or a URL.

  Raises:
    UserError: if the file that says it is damaged.
  """
  path = str(path).rstrip('/')
  for folder in (path, path.rpartition('/')[0] or '.'):
    file = storage.join(folder, FILE)
    if storage.exists(file):
      return _read(file)
  return {}


def write(model_dir, values: Mapping[str, str | None]) -> None:
  """Writes what the checkpoints in a folder are trained with, if any of it is known.

  Raises:
    UserError: if the folder has checkpoints that were trained with something else.
  """
  known = {kind: values[kind] for kind in fingerprints.KINDS if values.get(kind)}
  file = storage.join(model_dir, FILE)
  if storage.exists(file):
    found = fingerprints.mismatches(
      fingerprints.named(str(model_dir), _read(file)),
      fingerprints.named('this one', known),
      dict.fromkeys(fingerprints.KINDS, 'give another folder'),
    )
    if found:
      raise UserError(found[0])
  elif known:
    storage.write(file, json.dumps(known, indent=2) + '\n')


def check(given: Mapping[str, fingerprints.Fingerprint | None], allow_mismatch: bool) -> list[str]:
  """Compares a task with the checkpoints that t5x's gin values name, and keeps it for a new run.

  Args:
    given: {kind: fingerprint} of the task; None where it is not known.
    allow_mismatch: whether what differs is returned and not refused.

  Returns:
    A sentence for each mismatch.

  Raises:
    UserError: if a checkpoint was trained with another vocabulary or tokenizer.
  """
  found = []
  model_dir = _macro('MODEL_DIR')
  for path in filter(None, (model_dir, *map(_macro, _CHECKPOINTS))):
    found += fingerprints.mismatches(
      fingerprints.named(path, of_checkpoint(path)), given, _REMEDIES
    )
  if found and not allow_mismatch:
    raise UserError(f'{found[0]}; {_ALLOW}')
  if model_dir and not found and jax.process_index() == 0:
    write(model_dir, fingerprints.values(given))
  return found


def _macro(name: str) -> str | None:
  """The value of a gin macro; None if there is no such text."""
  try:
    value = gin.query_parameter(f'%{name}')
  except ValueError:
    return None
  return value if isinstance(value, str) else None


def _read(file: str) -> dict[str, str | None]:
  try:
    found = storage.read_json(file, _LARGEST)
    return {kind: found.get(kind) for kind in fingerprints.KINDS}
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(f'{file} is damaged; remove it') from error
