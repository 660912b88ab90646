"""`info.json` of a token cache, the names of its files, and the publishing of splits.

`token_cache` describes the format.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import xxhash

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import text_features

# Of caches without and with text features.
VERSION, VERSION_WITH_TEXT_FEATURES = 2, 3
KEYS = ('codebook_size', 'image_tokens', 'tokenizer')
HOW_TO_MAKE = 'run `parti-jax tokenize`'
_MAX_INFO = 2**28
# Characters that some file systems reject within a name, except for colons, which `file_part`
# escapes.
_REFUSED = r'\x00-\x1f\x7f/\\<>"|?*\ud800-\udfff'
_SPLIT = re.compile(rf'[^{_REFUSED}\s.-][^{_REFUSED}]*')
_LONGEST_SPLIT = 200
_MOVES_AT_ONCE = 32
_PIECE = 2**24
# Seconds until the holder of a lock is presumed dead, and between two checks.
_LOCK_SECONDS, _LOCK_LOOK = 60, 0.2


def read_info(folder: str) -> dict[str, Any]:
  """Reads the `info.json` of a token cache.

  Args:
    folder: the cache's folder.

  Returns:
    Its entries as described in `token_cache`, and any others that the writer added.

  Raises:
    UserError: the folder is missing, holds no finished cache, or a cache of an earlier version.
  """
  path = storage.join(folder, 'info.json')
  if not storage.exists(path):
    what = 'is not finished' if storage.exists(folder) else 'does not exist'
    raise UserError(f'the token cache {folder} {what}; {HOW_TO_MAKE} (gin: token_cache.path)')
  try:
    info = storage.read_json(path, _MAX_INFO)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} is damaged; {HOW_TO_MAKE} again') from error
  present = info if isinstance(info, dict) else {}
  missing = [key for key in (*KEYS, 'splits') if key not in present]
  if missing:
    raise UserError(f'{path} has no {", ".join(missing)}; {HOW_TO_MAKE} again')
  if info.get('version', 1) == 1:
    raise UserError(
      f'the token cache {folder} has version 1; convert it to version '
      f'{VERSION} with: parti-jax tokenize --convert={folder} --output_dir=FOLDER'
    )
  if not _is_valid(info):
    raise UserError(f'{path} is damaged; {HOW_TO_MAKE} again')
  return info


def _is_valid(info: Mapping[str, Any]) -> bool:
  """Returns whether the entries that we read have the right types."""
  return (
    _whole(info['codebook_size'])
    and _whole(info['image_tokens'])
    and _whole(info.get('views'))
    and _has_valid_grid(info)
    and info['version'] == _version(info)
    and isinstance(info['tokenizer'], str)
    and are_splits(info['splits'])
    and _has_valid_text_features(info)
  )


def _has_valid_grid(info: Mapping[str, Any]) -> bool:
  grid = info.get('grid')
  return grid is None or (
    isinstance(grid, list)
    and len(grid) == 2
    and all(_whole(side) for side in grid)
    and grid[0] * grid[1] == info['image_tokens']
  )


def _version(info: Mapping[str, Any]) -> int:
  return VERSION if info.get(text_features.ENTRY) is None else VERSION_WITH_TEXT_FEATURES


def _has_valid_text_features(info: Mapping[str, Any]) -> bool:
  try:
    text_features.of_info(info)
  except ValueError:
    return False
  return True


def are_splits(splits: Any) -> bool:
  """Returns whether the 'splits' of an `info.json` have the right form."""
  if not isinstance(splits, dict):
    return False
  for split in splits.values():
    if not (
      isinstance(split, dict)
      and _whole(split.get('examples'))
      and isinstance(split.get('shards'), list)
      and split['shards']
    ):
      return False
    for shard in split['shards']:
      if not (
        isinstance(shard, dict) and _whole(shard.get('examples'), 0) and _whole(shard.get('bytes'))
      ):
        return False
    if split['examples'] != sum(shard['examples'] for shard in split['shards']):
      return False
  return True


def _whole(value: Any, least: int = 1) -> bool:
  return type(value) is int and least <= value < 2**40  # Excludes bool.


def check_split_name(split: str) -> None:
  """Raises UserError unless the name of a split can be part of a file name."""
  if not _SPLIT.fullmatch(split) or len(split.encode('utf-8', 'replace')) > _LONGEST_SPLIT:
    raise UserError(
      f'the split {split[:80]!r} cannot be part of a file name; rename it in the '
      'source, with letters, digits, spaces and -_.+=, 200 bytes at most'
    )


def split_info(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the entry of a split in `info.json`, given those of its shards."""
  return {'examples': sum(shard['examples'] for shard in shards), 'shards': list(shards)}


def shard_name(split: str, index: int) -> str:
  """Returns the file name of a shard."""
  return f'{file_part(split)}-{index:05d}.array_record'


def file_part(split: str) -> str:
  """Returns the prefix of a split's file names; escapes the colons of slices ('train[:10%]')."""
  return split.replace('%', '%25').replace(':', '%3A')


def is_shard(name: str, split: str) -> bool:
  """Returns whether a file name belongs to a shard of a split, of this version or version 1."""
  stem, _, ending = name.rpartition('.')
  number = stem.removeprefix(f'{file_part(split)}-')
  return ending in ('array_record', 'tfrecord') and number != stem and number.isdecimal()


def write_info(folder: str, info: Mapping[str, Any]) -> None:
  """Writes `info.json`."""
  splits = dict(sorted(info['splits'].items()))
  info = {'version': _version(info), 'views': 1, **info, 'splits': splits}
  storage.write(storage.join(folder, 'info.json'), json.dumps(info, indent=2))


def _same_name(split: str) -> str:
  """Returns a split's name as seen by file systems that fold case and normal forms."""
  return unicodedata.normalize('NFKC', split).casefold()


def other_splits(folder: str, info: Mapping[str, Any], replaced: Sequence[str]) -> dict[str, Any]:
  """Returns the finished splits to keep, after checking that they use the same tokenizer.

  Args:
    folder: folder of the cache.
    info: info of the cache that is being written.
    replaced: the splits that are being written: the first is never kept, the others only if they
      use the same tokenizer.

  Raises:
    UserError: the other splits use another tokenizer, or have a name too similar to the first's.
  """
  if not storage.exists(storage.join(folder, 'info.json')):
    return {}
  present, (split, *others) = read_info(folder), replaced
  splits = {name: value for name, value in present['splits'].items() if name != split}
  for name in splits:
    if _same_name(name) == _same_name(split):
      raise UserError(
        f'the token cache {folder} holds a split {name!r}, whose files have the same '
        f'names as those of {split!r} on some file systems; choose another folder'
      )
  differences = differing(present, info)
  if differences:
    splits = {name: value for name, value in splits.items() if name not in others}
  if splits and differences:
    key, (theirs, ours) = next(iter(differences.items()))
    raise UserError(
      f'the token cache {folder} holds {", ".join(splits)} with {key} '
      f'{theirs}, not {ours}; choose another folder or remove it'
    )
  return splits


def differing(present: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Returns the entries that two caches must share but don't: {key: (theirs, ours)}."""
  defaults = dict.fromkeys(KEYS, 1) | {'views': 1, text_features.ENTRY: None}
  return {
    key: (theirs, ours)
    for key, default in defaults.items()
    if (theirs := present.get(key, default)) != (ours := info.get(key, default))
  }


def digest(path: str) -> str:
  """Returns the XXH3 digest of a file, 32 hexadecimal digits."""
  found = xxhash.xxh3_128()
  with storage.open_file(path) as file:
    while piece := file.read(_PIECE):
      found.update(piece)
  return found.hexdigest()


class LostShard(Exception):
  """A shard to put in place is missing or damaged; the argument is its index."""


def put_in_place(
  folder: str,
  info: Mapping[str, Any],
  split: str,
  entry: Mapping[str, Any],
  files: Sequence[str],
  replaced: Sequence[str] = (),
) -> None:
  """Moves the finished shards of a split into a cache and adds them to `info.json`.

  If the process is killed, calling it again completes the work. Several processes may call it with
  the same arguments concurrently.

  Args:
    folder: folder of the cache.
    info: info of the cache, as in `token_cache.write_token_cache`.
    split: the split's name.
    entry: the result of `split_info`.
    files: the shards, on the same disk or store as the cache.
    replaced: other splits to remove if they use another tokenizer.

  Raises:
    LostShard: a shard is neither staged nor in place, or has the wrong size.
  """
  with _locked(folder):
    others = other_splits(folder, info, (split, *replaced))
    if storage.exists(storage.join(folder, 'info.json')):
      if read_info(folder)['splits'].get(split, entry) != entry:
        write_info(folder, {**info, 'splits': others})
  names = [shard_name(split, index) for index in range(len(files))]

  def move(index: int) -> None:
    target = storage.join(folder, names[index])
    try:
      storage.move(files[index], target)
    except FileNotFoundError as error:
      # Already in place, unless the target is a shard of another split of this name. Sizes are
      # multiples of 64 KiB, so they can't distinguish them.
      if not storage.exists(target) or digest(target) != entry['shards'][index]['digest']:
        raise LostShard(index) from error

  with concurrent.futures.ThreadPoolExecutor(_MOVES_AT_ONCE) as executor:
    list(executor.map(move, range(len(files))))
  sizes = storage.sizes(folder)
  for index, name in enumerate(names):
    if sizes.get(name) != entry['shards'][index]['bytes']:
      raise LostShard(index)
  for name in set(storage.names(folder)) - set(names):
    if is_shard(name, split):
      with contextlib.suppress(FileNotFoundError):
        storage.remove(storage.join(folder, name))
  with _locked(folder):
    others = other_splits(folder, info, (split, *replaced))
    write_info(folder, {**info, 'splits': {**others, split: entry}})


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
  """Locks `info.json` for one process at a time, since each may add another split."""
  storage.make_folder(folder)
  path, mine = storage.join(folder, '.info.lock'), secrets.token_hex(8).encode()
  holder, since = None, time.monotonic()
  while True:
    try:
      storage.create(path, mine)
      break
    except FileExistsError:
      found = None
      with contextlib.suppress(FileNotFoundError):
        found = storage.read(path, storage.MAX_JSON)
      if found != holder:
        holder, since = found, time.monotonic()
      elif time.monotonic() - since > _LOCK_SECONDS:  # Its holder was killed.
        _release(path, holder)
      time.sleep(_LOCK_LOOK)
  try:
    yield
  finally:
    _release(path, mine)


def _release(path: str, holder: bytes | None) -> None:
  """Removes a lock, unless another process holds it by now."""
  with contextlib.suppress(FileNotFoundError):
    if storage.read(path, storage.MAX_JSON) == holder:
      storage.remove(path)


def cannot_write(folder: str, error: OSError) -> UserError:
  """Returns the UserError for an OSError during writing of a cache."""
  return UserError(f'the token cache {folder} cannot be written: {error.strerror or error}')


def remove_folder(folder: str) -> None:
  """Removes a folder on a disk or in a store, if it exists."""
  if storage.is_url(folder):
    storage.remove_folder(folder)
  else:
    shutil.rmtree(folder, ignore_errors=True)
