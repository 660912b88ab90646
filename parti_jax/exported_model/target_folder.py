"""The folder that a model is written to: it appears or is replaced as a whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Collection
from collections.abc import Iterator

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import file_names


def check(folder: pathlib.Path | str, overwrite: bool, part: str | None = None):
  """Checks that a folder may be written.

  Args:
    folder: the folder, a path or a URL.
    overwrite: whether an existing model folder may be replaced.
    part: name of the only network that will be written; None for a whole model. It doesn't replace a
      folder with other networks.

  Raises:
    UserError: if the folder exists and may not be replaced.
  """
  if not (storage.exists(folder) or os.path.lexists(folder)):
    return
  where = storage.join(folder, file_names.CONFIG_FILE)
  if not storage.exists(where):
    raise UserError(f"{folder} exists and isn't a model folder; choose another folder")
  try:
    config = storage.read_json(where)
  except (OSError, ValueError):
    config = {'format_version': None}  # A damaged model may be replaced.
  if not isinstance(config, dict) or 'format_version' not in config:
    raise UserError(
      f'{folder} exists, and its {file_names.CONFIG_FILE} is not of parti_jax; choose another folder'
    )
  others = set(config.get('parameters') or {}) - {'stored_as', part}
  if part and others:
    raise UserError(
      f'{folder} is a model with {", ".join(sorted(others))}, which a {part.replace("_", " ")} alone '
      'would replace; choose another folder'
    )
  if not overwrite:
    raise UserError(f'the model folder {folder} exists; choose another one, or allow overwriting')


@contextlib.contextmanager
def filled(folder: pathlib.Path | str, ours: Collection[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary folder whose files afterwards replace those of a model folder.

  Args:
    folder: the model folder, a path or a URL. At a URL, config.json is uploaded last.
    ours: names of all files that a model folder may have; the folder's other files are kept.

  Raises:
    UserError: if the folder can't be written.
  """
  if isinstance(folder, pathlib.Path):
    # Without links and '..', which would lead elsewhere once the folder is moved.
    with _replaced(folder.resolve(), ours) as temporary:
      yield temporary
  else:
    with _uploaded(folder, ours) as temporary:
      yield temporary


@contextlib.contextmanager
def _uploaded(url: str, ours: Collection[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary folder and uploads its files to a URL afterwards, config.json last."""
  config = file_names.CONFIG_FILE
  with tempfile.TemporaryDirectory(prefix='parti_jax_model_') as temporary:
    yield pathlib.Path(temporary)
    for name in sorted(set(ours) & set(storage.names(url)), key=lambda name: name != config):
      storage.remove(storage.join(url, name))
    for name in sorted(os.listdir(temporary), key=lambda name: name == config):
      storage.upload(os.path.join(temporary, name), storage.join(url, name))


@contextlib.contextmanager
def _replaced(folder: pathlib.Path, ours: Collection[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that replaces `folder` afterwards."""
  temporary = folder.with_name(f'.{folder.name}.{secrets.token_hex(4)}')
  try:
    temporary.mkdir(parents=True)
    yield temporary
    old = folder.with_name(f'{temporary.name}.old')
    if folder.exists():
      for other in set(os.listdir(folder)) - set(ours):
        copy = shutil.copytree if (folder / other).is_dir() else shutil.copy2
        copy(folder / other, temporary / other)
      os.replace(folder, old)
    try:
      os.replace(temporary, folder)
    except OSError:
      if old.exists():
        os.replace(old, folder)
      raise
    shutil.rmtree(old, ignore_errors=True)
  except OSError as error:
    raise UserError(f'the model folder {folder} cannot be written: {error}') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
