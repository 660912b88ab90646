"""Writes and checks a checkpoint's manifest: the size and digest of each file, to detect damage.

Orbax commits a checkpoint by renaming its folder. The manifest is written just before that, when
all other files exist, so that a committed checkpoint always has one. `seal` adds the two files that
Orbax writes while committing right afterwards; until then they are recognized by their form.

With several processes, each hashes the files that it has written, and the first merges these parts.
The digests are XXH3, which detects damage but not forgery, and is faster than any disk.
"""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Sequence

import xxhash
from etils import epath

from parti_jax.core import errors
from parti_jax.core import storage

NAME = 'manifest.json'
# Entry of a checkpoint's own metadata, so that a lost manifest is noticed.
CUSTOM_METADATA = {'manifest': NAME}
_METADATA, _COMMITTED = '_CHECKPOINT_METADATA', 'commit_success.txt'
_LATE = (_METADATA, _COMMITTED)
_CHUNK = 1 << 24
_THREADS = 8


def write_part(folder: epath.Path, process: int) -> None:
  """Writes a part of the manifest, for the files that one of several processes has written.

  Args:
    folder: folder of the unfinished checkpoint.
    process: index of the process, which has written all its files.
  """
  # Each item still has a temporary name, which it loses before the commit.
  # Imported here because reading manifests doesn't need Orbax.
  import orbax.checkpoint as ocp

  own = {
    name.replace(ocp.utils.TMP_DIR_SUFFIX, ''): path
    for name, path in _files(folder)
    if _writer(name) == process
  }
  _write(folder / part_name(process), _entries(own))


def write(folder: epath.Path) -> None:
  """Writes the manifest of a checkpoint that is whole but not committed yet.

  Args:
    folder: folder of the checkpoint. The parts that `write_part` left there are merged.

  Raises:
    OSError: if a file can't be read or written.
  """
  files = dict(_files(folder))
  parts = [path for name, path in files.items() if name.startswith(f'{NAME}.')]
  known: dict[str, list] = {}
  for part in parts:
    known |= _read(part)
  rest = {
    name: path
    for name, path in files.items()
    if name not in known and name not in _LATE and not name.startswith(NAME)
  }
  _write(folder / NAME, known | _entries(rest))
  for part in parts:
    part.unlink()


def part_name(process: int) -> str:
  """Name of the part of a manifest on what one of several processes has written."""
  return f'{NAME}.{process}'


def text_of(folder: epath.Path, names: Sequence[str], parts: Sequence[bytes] = ()) -> str:
  """A manifest's text on some files of a folder, and on those of other processes.

  Args:
    folder: has a manifest.
    names: names of the files in the manifest.
    parts: results of this function in the other processes.

  Raises:
    UserError: a part is damaged.
  """
  known = _read(folder / NAME)
  entries = {name: known[name] for name in names if name in known}
  entries |= _entries({name: folder / name for name in names if name not in known})
  for part in parts:
    try:
      entries |= _entries_in(part.decode(), 'part')
    except ValueError as error:
      raise errors.UserError(
        f'{folder.name}: the manifest of another process is damaged in the store; start again'
      ) from error
  return _text(entries)


def seal(folder: epath.Path) -> None:
  """Adds the files that Orbax wrote at the end to the manifest of a committed checkpoint."""
  late = {name: folder / name for name in _LATE if (folder / name).exists()}
  _write(folder / NAME, _read(folder / NAME) | _entries(late))


def fault(
  folder: epath.Path, share: int = 0, shares: int = 1, sizes_alone: bool = False
) -> str | None:
  """Checks a checkpoint's files against its manifest.

  Args:
    folder: folder of a committed checkpoint.
    share: index of the part of the files to read, for several processes to divide the work.
    shares: number of parts.
    sizes_alone: whether to compare only the sizes, without reading the files.

  Returns:
    None if all files are as they were written; else a description of the first fault.

  Raises:
    FileNotFoundError: if the checkpoint was written without a manifest.
  """
  if not (folder / NAME).exists():
    if _says_manifest(folder):
      return f'{NAME} is missing'
    raise FileNotFoundError(folder / NAME)
  try:
    wanted = _read(folder / NAME)
  except (ValueError, OSError):
    return f'{NAME} is damaged'
  for name in _LATE:
    if name not in wanted and not _well_formed(folder / name):
      return f'{name} is missing or damaged'
  # Distributing the files by size gives all processes about the same amount to read.
  order = sorted(wanted, key=lambda name: (-wanted[name][0], name))[share::shares]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    faults = pool.map(
      lambda name: _fault(
        folder / name, name, wanted[name][0], None if sizes_alone else wanted[name][1]
      ),
      order,
    )
    return next((found for found in faults if found), None)


def size(folder: epath.Path) -> int:
  """Returns the bytes of all files of a checkpoint."""
  return sum(path.stat().length for _, path in _files(folder))


def _fault(path: epath.Path, name: str, length: int, digest: str | None) -> str | None:
  try:
    found = path.stat().length
    if found < length:
      return f'{name} is truncated ({found} of {length} bytes)'
    if found > length:
      return f'{name} has {found} bytes instead of {length}'
    unchanged = digest is None or _digest(path) == digest
    return None if unchanged else f'{name} has other bytes than were written'
  except FileNotFoundError:
    return f'{name} is missing'
  except OSError as error:
    return f"{name} can't be read ({error.strerror or error})"


def _files(folder: epath.Path, within: str = ''):
  """Yields (path relative to the checkpoint, path) for all its files."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path, f'{within}{path.name}/')
    else:
      yield f'{within}{path.name}', path


def _writer(name: str) -> int | None:
  """Returns the process whose folder a file is in, in a checkpoint of several processes, or None."""
  found = [part.rpartition('_')[2] for part in name.split('/') if part.startswith('ocdbt.process_')]
  return int(found[0]) if found and found[0].isdecimal() else None


def _entries(files: dict[str, epath.Path]) -> dict[str, list]:
  """Returns {file: [bytes, digest]}."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(_digest, files.values())
    return {
      name: [path.stat().length, digest] for (name, path), digest in zip(files.items(), digests)
    }


def _digest(path: epath.Path) -> str:
  digest = xxhash.xxh3_128()
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def _write(path: epath.Path, entries: dict[str, list]) -> None:
  """Writes entries with a digest over them, atomically."""
  storage.write(path, _text(entries))


def _text(entries: dict[str, list]) -> str:
  lines = (f'{json.dumps(name)}: {json.dumps(entries[name])}' for name in sorted(entries))
  body = '{\n' + ',\n'.join(lines) + '\n}'
  own = xxhash.xxh3_128_hexdigest(body.encode())
  return f'{{"algorithm": "xxh3_128", "digest": "{own}", "files": {body}}}\n'


def _read(path: epath.Path) -> dict[str, list]:
  """Returns a manifest's entries; raises ValueError unless all bytes are as they were written."""
  if path.stat().length > storage.MAX_JSON:
    raise ValueError(f'{path}: too large')
  return _entries_in(path.read_bytes().decode(), path)


def _entries_in(text: str, path) -> dict[str, list]:
  """Entries in a manifest's text, as `_read`."""
  try:
    entries = json.loads(text)['files']
    unchanged = text == _text(entries) and all(map(_within, entries))
  except (LookupError, TypeError, AttributeError, RecursionError):
    unchanged = False
  if not unchanged:
    raise ValueError(f'{path}: damaged')
  return entries


def _within(name: str) -> bool:
  """Returns whether a relative path stays within the checkpoint."""
  path = pathlib.PurePosixPath(name)
  return not path.is_absolute() and '..' not in path.parts


def _says_manifest(folder: epath.Path) -> bool:
  """Returns whether a checkpoint's own metadata says that it has a manifest."""
  try:
    metadata = json.loads((folder / _METADATA).read_text())
    return metadata['custom_metadata'] == CUSTOM_METADATA
  except (OSError, ValueError, LookupError, TypeError):
    return False


def _well_formed(path: epath.Path) -> bool:
  """Returns whether a file that Orbax writes while committing has the right form."""
  try:
    text = path.read_text()
    if path.name == _COMMITTED:
      return text.startswith('Checkpoint commit was successful to ') and text.endswith(
        f'/{path.parent.name}'
      )
    return json.loads(text)['custom_metadata'] == CUSTOM_METADATA
  except (OSError, ValueError, LookupError, TypeError):
    return False
