"""Records the vocabulary and the tokenizer that t5x's checkpoints were trained with.

t5x itself ignores the file, `inputs.json` in its MODEL_DIR, which has the fingerprints of both
(`parti_jax.core.fingerprints`). It is written when training begins, or by `parti-jax
t5x_checkpoint`, and compared when a task is used with a checkpoint.
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
# Macros of t5x's gin files whose value is a checkpoint, `.../checkpoint_<step>`, or a MODEL_DIR.
_CHECKPOINTS = ('INITIAL_CHECKPOINT_PATH', 'CHECKPOINT_PATH')
_REMEDIES = {
  'vocabulary': 'set vocabulary.path to the one that it was trained with',
  'tokenizer': 'set token_cache.path to tokens of the one that it was trained with',
}
_ALLOW = 'or set check_inputs.allow_mismatch=True to use it anyway'


def of_checkpoint(path) -> dict[str, str | None]:
  """Returns the fingerprints, {kind: digits}, of a t5x checkpoint; {} if they are unknown.

  Args:
    path: the checkpoint's folder or its MODEL_DIR, as a path or a URL.

  Raises:
    UserError: if the file with the fingerprints is damaged.
  """
  path = str(path).rstrip('/')
  for folder in (path, path.rpartition('/')[0] or '.'):
    file = storage.join(folder, FILE)
    if storage.exists(file):
      return _read(file)
  return {}


def write(model_dir, values: Mapping[str, str | None]) -> None:
  """Writes the known fingerprints of the checkpoints in a folder, if there are any.

  Args:
    model_dir: the folder, a path or a URL.
    values: {kind: digits}; None for unknown ones.

  Raises:
    UserError: if the folder has checkpoints with other fingerprints.
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
  """Compares a task with the checkpoints in t5x's gin values; records it for a new run.

  Args:
    given: {kind: fingerprint} of the task; None for unknown ones.
    allow_mismatch: whether to return mismatches instead of raising an error.

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
  """Returns the value of a gin macro; None unless it is a string."""
  try:
    value = gin.query_parameter(f'%{name}')
  except ValueError:
    return None
  return value if isinstance(value, str) else None


def _read(file: str) -> dict[str, str | None]:
  """Reads fingerprints, {kind: digits}."""
  try:
    found = storage.read_json(file, _LARGEST)
    return {kind: digits for kind in fingerprints.KINDS if (digits := found.get(kind))}
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(f'{file} is damaged; remove it') from error
