"""A split of a token cache, written in parts by any number of processes.

Each part becomes one shard. Until all parts are finished, they are in the folder `.SPLIT.parts` of
the cache:

  made_with.json          the inputs of the tokens; all processes must agree on them
  KEY-00017.array_record  the shard of part 17; KEY is a digest of made_with.json
  KEY-00017.json          written after the shard: its entry, and the skipped examples

A part is finished when its JSON file exists and its shard has the size stated there. A process that
finds all parts finished puts the shards in place and adds the split to `info.json`. Each step can
be repeated, so a process may be killed at any time and several may merge concurrently.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import json
from collections.abc import Container
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import xxhash

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import text_features
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info

TALLIES = ('skipped', 'shortened')
_MADE_WITH = 'made_with.json'
_FOLLOWING = (text_features.EMPTY_TEXT, 'grid')
_READS_AT_ONCE = 32


class SplitParts:
  """The parts of a split.

  Args:
    folder: folder of the token cache.
    split: the split's name.
    info: 'codebook_size', 'image_tokens', 'tokenizer', 'grid' and 'views' of the cache, and the
      entries of its text features, if it has any.
    made_with: further inputs that the tokens depend on, JSON.
    count: number of parts.
    replaced: other splits that the same command writes, to remove if they use another tokenizer.

  Attributes:
    folder: folder of the token cache.
    split: the split's name.
    count: number of parts.
  """

  def __init__(
    self,
    folder: str,
    split: str,
    info: Mapping[str, Any],
    made_with: Mapping[str, Any],
    count: int,
    replaced: Sequence[str] = (),
  ):
    token_cache_info.check_split_name(split)
    self.folder, self.split, self.count = folder, split, count
    self._info, self._replaced = dict(info), replaced
    # In the form in which JSON returns them, with lists instead of tuples.
    self._made_with = json.loads(json.dumps({**made_with, 'parts': count}))
    # The features of the empty text and the grid follow from the others.
    compared = {key: value for key, value in self._info.items() if key not in _FOLLOWING}
    self._whole = {**json.loads(json.dumps(compared)), **self._made_with}
    self._key = xxhash.xxh3_64_hexdigest(json.dumps(self._whole, sort_keys=True).encode())
    self._parts = storage.join(folder, f'.{token_cache_info.file_part(split)}.parts')

  def check(self, overwrite: bool) -> bool:
    """Compares the cache's content with what this object would write; changes nothing.

    Args:
      overwrite: whether to replace a split that was made differently.

    Returns:
      Whether anything is left to do: False if the split is finished and up to date.

    Raises:
      UserError: the split, or parts of it, exist but were made differently.
    """
    with self._reported():
      entry, present = self._entry()
      if entry is not None:
        if self._is_ours(entry, present):
          return not self._is_whole(entry)
        if not overwrite:
          self._refuse('a finished split', {**present, **entry.get('made_with', {})})
      token_cache_info.other_splits(self.folder, self._info, (self.split, *self._replaced))
      begun = self._read(_MADE_WITH)
      if begun not in (None, self._whole) and not overwrite:
        self._refuse('parts of a split', begun)
      return True

  def begin(self) -> None:
    """Starts writing the split, and removes parts made differently; call `check` first."""
    with self._reported():
      if self.finished():
        return
      if self._read(_MADE_WITH) != self._whole:
        storage.write(storage.join(self._parts, _MADE_WITH), json.dumps(self._whole, indent=2))
      for name in storage.names(self._parts):
        if not name.startswith((self._key, '.')) and name != _MADE_WITH:
          with contextlib.suppress(FileNotFoundError):
            storage.remove(storage.join(self._parts, name))

  def clean(self) -> None:
    """Removes leftover parts of a finished split, in case `merge` was killed at its end."""
    with self._reported():
      if self._read(_MADE_WITH) in (None, self._whole):
        token_cache_info.remove_folder(self._parts)

  def unfinished(self, indices: Iterable[int]) -> list[int]:
    """Returns which of these parts must be written."""
    with self._reported():
      if self.finished():
        return []
      sizes = storage.sizes(self._parts)
      # If all of them are written, a merge may be moving the shards.
      merging = len(self._unwritten(sizes)) == 0
      with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as executor:
        indices = list(indices)
        facts = executor.map(
          lambda index: self._facts(index) if self._json(index) in sizes else None, indices
        )
        return [
          index
          for index, found in zip(indices, facts)
          if found is None
          or not (
            merging
            or not found['examples']
            or sizes.get(self._shard(index)) == found['shard']['bytes']
          )
        ]

  def left(self) -> list[int]:
    """Returns the parts that no process has finished yet."""
    with self._reported():
      return [] if self.finished() else self._unwritten(set(storage.names(self._parts)))

  def is_written(self, index: int) -> bool:
    """Returns whether a part, or the whole split, is finished."""
    with self._reported():
      return storage.exists(storage.join(self._parts, self._json(index))) or self.finished()

  def write(
    self, index: int, records: Iterable[bytes], tallies: Mapping[str, Mapping[str, int]]
  ) -> None:
    """Writes a part.

    Args:
      index: index of the part.
      records: records from `token_cache.serialized`.
      tallies: {reason: examples} for each of `TALLIES`, complete after the last record is taken.

    Raises:
      UserError: the cache can't be written, or another process writes other tokens here.
    """
    with self._reported():
      records = iter(records)
      first = next(records, None)
      shard = (
        None
        if first is None
        else token_cache.write_shard(
          storage.join(self._parts, self._shard(index)), itertools.chain([first], records)
        )
      )
      begun = self._read(_MADE_WITH)
      if begun not in (None, self._whole):
        self._refuse('parts of a split that another process writes', begun)
      facts = {
        'part': index,
        'examples': shard['examples'] if shard else 0,
        'shard': shard,
        **{name: dict(tallies[name]) for name in TALLIES},
      }
      storage.write(storage.join(self._parts, self._json(index)), json.dumps(facts))

  def merge(self) -> bool:
    """Makes a split of all parts, or completes another process's merge.

    Returns:
      Whether the split is finished; False if a part turned out to be damaged and must be written
      again.

    Raises:
      UserError: no part has any examples.
    """
    with self._reported():
      if not self.finished():
        with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as executor:
          facts = list(executor.map(self._facts, range(self.count)))
        whole = [found for found in facts if found is not None]
        damaged = [index for index, found in enumerate(facts) if found is None]
        if damaged and not self.finished():
          self._forget(damaged)
          return False
        if not damaged and not self._put_in_place(whole):
          return False
      token_cache_info.remove_folder(self._parts)
      return True

  def finished(self) -> bool:
    """Returns whether the cache has the split, complete and up to date."""
    with self._reported():
      entry, present = self._entry()
      return entry is not None and self._is_ours(entry, present) and self._is_whole(entry)

  def summary(self) -> dict[str, Any]:
    """Returns 'examples', 'skipped' and 'shortened' of the finished split."""
    entry, _ = self._entry()
    assert entry is not None
    return {name: entry[name] for name in ('examples', *TALLIES)}

  def _put_in_place(self, facts: Sequence[Mapping[str, Any]]) -> bool:
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in TALLIES}
    for found in facts:
      for name in TALLIES:
        counts[name].update(found[name])
    totals = {
      name: dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
      for name, counted in counts.items()
    }
    used = [found for found in facts if found['examples']]
    if not used:
      reasons = ', '.join(f'{count:,} {reason}' for reason, count in totals['skipped'].items())
      raise UserError(
        f'no usable example in split {self.split!r}'
        + (f'; skipped {reasons}' if reasons else '; it is empty')
      )
    entry = {
      **token_cache_info.split_info([found['shard'] for found in used]),
      **totals,
      'made_with': self._made_with,
    }
    files = [storage.join(self._parts, self._shard(found['part'])) for found in used]
    try:
      token_cache_info.put_in_place(
        self.folder, self._info, self.split, entry, files, self._replaced
      )
    except token_cache_info.LostShard as error:
      if self.finished():
        return True
      self._forget([used[error.args[0]]['part']])
      return False
    return True

  def _forget(self, indices: Iterable[int]) -> None:
    """Removes the JSON files of parts, so that they are written again."""
    for index in indices:
      with contextlib.suppress(FileNotFoundError):
        storage.remove(storage.join(self._parts, self._json(index)))

  def _entry(self) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Returns the split's entry in `info.json`, None if it has none, and the whole info."""
    if not storage.exists(storage.join(self.folder, 'info.json')):
      return None, {}
    present = token_cache_info.read_info(self.folder)
    return present['splits'].get(self.split), present

  def _is_ours(self, entry: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    return not token_cache_info.differing(present, self._info) and (
      entry.get('made_with') == self._made_with
    )

  def _is_whole(self, entry: Mapping[str, Any]) -> bool:
    """Returns whether all shards of a split are in place with the right sizes."""
    sizes = storage.sizes(self.folder)
    return all(
      sizes.get(token_cache_info.shard_name(self.split, index)) == shard['bytes']
      for index, shard in enumerate(entry['shards'])
    )

  def _refuse(self, what: str, found: Any) -> None:
    found = found if isinstance(found, dict) else {}
    differences = [
      f'{name} {found.get(name)}, not {ours}'
      for name, ours in ({text_features.ENTRY: None} | self._whole).items()
      if found.get(name) != ours
    ]
    raise UserError(
      f'the token cache {self.folder} holds {what} {self.split!r} with '
      f'{"; ".join(differences)}; --overwrite replaces it, or choose another folder'
    )

  def _unwritten(self, names: Container[str]) -> list[int]:
    return [index for index in range(self.count) if self._json(index) not in names]

  def _facts(self, index: int) -> dict[str, Any] | None:
    """Returns the JSON of a part; None if it is missing or damaged."""
    found = self._read(self._json(index))
    whole = lambda value, least: type(value) is int and value >= least  # Excludes bool.
    if not (
      isinstance(found, dict)
      and found.get('part') == index
      and whole(found.get('examples'), 0)
      and 'shard' in found
      and all(
        isinstance(found.get(name), dict) and all(whole(count, 1) for count in found[name].values())
        for name in TALLIES
      )
    ):
      return None
    shard = found['shard']
    if found['examples'] == 0 and shard is None:
      return found
    fits = (
      isinstance(shard, dict)
      and shard.get('examples') == found['examples']
      and whole(shard.get('bytes'), 1)
      and isinstance(shard.get('digest'), str)
    )
    return found if fits else None

  def _read(self, name: str) -> Any:
    try:
      return storage.read_json(storage.join(self._parts, name))
    except (FileNotFoundError, ValueError):
      return None

  def _json(self, index: int) -> str:
    return f'{self._key}-{index:05d}.json'

  def _shard(self, index: int) -> str:
    return f'{self._key}-{index:05d}.array_record'

  @contextlib.contextmanager
  def _reported(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise token_cache_info.cannot_write(self.folder, error) from error
