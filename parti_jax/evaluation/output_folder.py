"""The folder of a command's results: checked before the work, claimed by one run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable
from collections.abc import Mapping

from PIL import Image

from parti_jax.core import storage
from parti_jax.core.errors import UserError

RUN_FILE = 'run.json'


def make(path: str) -> pathlib.Path:
  """Creates the output folder before the long work, so that errors appear early.

  Raises:
    UserError: the folder isn't writable.
  """
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(
      f'--output_dir {path}: cannot write there ({error.strerror}); choose another folder'
    ) from error
  return folder


def claim(folder: pathlib.Path, run: Mapping[str, object]):
  """Records in a folder what its pictures are made from, so that only the same run continues there.

  Args:
    folder: a folder from `make`.
    run: everything that the pictures depend on, by names known to users; for JSON.

  Raises:
    UserError: the folder holds pictures of another run; the message names the difference.
  """
  path = folder / RUN_FILE
  run = json.loads(json.dumps(run))
  if not path.exists():
    write(path, (json.dumps(run, indent=2, ensure_ascii=False) + '\n').encode())
    return
  try:
    there = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(there, dict):
      raise ValueError
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} is damaged; choose another --output_dir') from error
  for key, value in run.items():
    if there.get(key) != value:
      raise UserError(
        f'--output_dir {folder} holds pictures of another run, with {key} '
        f'{there.get(key)!r}, but this one has {value!r}; choose another folder'
      )


def write(path: pathlib.Path, content: bytes):
  """Writes a file atomically, by renaming a temporary file.

  Raises:
    UserError: it can't be written.
  """
  # Processes on several hosts may share the folder and have the same id.
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.{secrets.token_hex(4)}')
  try:
    try:
      temporary.write_bytes(content)
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'{path} cannot be written ({error.strerror or error})') from error


def png(page: Image.Image) -> bytes:
  """Encodes a picture as PNG."""
  buffer = io.BytesIO()
  page.save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def fingerprint(*parts: bytes) -> str:
  """Returns a short hash of some bytes."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(len(part).to_bytes(8, 'little') + part)
  return digest.hexdigest()[:16]


def ranker_fingerprint(folder) -> str | None:
  """Returns a hash of the folder of a ranker, as `model_fingerprint`; None for the model's own."""
  return None if folder is None else model_fingerprint(folder)


def ranker_weights(folder) -> str:
  """Returns a hash of the weights of the ranker in a folder, as `model_fingerprint`.

  Args:
    folder: path or URL of a model or of a ranker; None for the demo model.
  """
  return _fingerprint_of(folder, lambda name: name.startswith('ranker'))


def model_fingerprint(folder) -> str:
  """Returns a hash of a model folder, over its small files and the ends of its large ones.

  Args:
    folder: path or URL of the folder; None for the demo model.
  """
  return _fingerprint_of(folder, lambda name: True)


def _fingerprint_of(folder, wanted: Callable[[str], bool]) -> str:
  if folder is None:
    # Imported here, since it imports JAX, which takes a moment.
    from parti_jax.sampling import text_to_image

    folder = text_to_image.DEMO_FOLDER
  elif storage.is_url(folder):
    folder = storage.local_folder(folder, storage.names(folder))
  parts = []
  for path in sorted(pathlib.Path(folder).iterdir()):
    if path.suffix in ('.json', '.safetensors', '.model') and wanted(path.name):
      with path.open('rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        parts += [path.name.encode(), str(size).encode(), start, file.read()]
  return fingerprint(*parts)
