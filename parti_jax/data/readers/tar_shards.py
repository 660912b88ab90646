"""Reads tar shards of samples: files of the same name with different endings.

img2dataset writes 000000012.jpg, 000000012.txt and 000000012.json one after another. The ending is
the part of a file's name after the last dot; the part before it is the sample's key.
"""

import json
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import IO

from parti_jax.core import storage
from parti_jax.data import captions
from parti_jax.data import image_decoding
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import tar_members

# Equivalent endings.
_SAME = {ending: 'jpg' for ending in ('jpeg', 'jpe', 'jfif')}
# The first of these among a sample's pictures is read.
_PICTURES = tuple(ending for ending in image_decoding.ENDINGS if ending not in _SAME)
_WANTED = frozenset((*image_decoding.ENDINGS, 'txt', 'json'))
# Parsed JSON takes many times its size in memory.
_MAX_JSON = 2**20
# Number of other files' names, and of sample keys, kept to find out which belong together.
_MAX_OTHERS = 1000
# Maximum number of dots at which a name is split.
_MAX_DOTS = 30


def samples(
  path: str, caption_key: str | None, describe: bool = False
) -> Iterator[Mapping[str, Any] | Damaged]:
  """Reads the shard at a path or URL with `samples_in`."""
  with storage.open_file(path) as file:
    yield from samples_in(file, caption_key, describe)


def samples_in(
  file: IO[bytes], caption_key: str | None, describe: bool = False
) -> Iterator[Mapping[str, Any] | Damaged]:
  """Reads a shard.

  The files of a sample are adjacent. A repeated ending of the same key begins another sample. If
  the previous sample had no picture or no caption, the next caption may belong to either, so it is
  replaced by `captions.AMBIGUOUS`.

  Args:
    file: the shard, plain or packed, open for reading at its beginning.
    caption_key: key of the caption in a sample's .json file. None for the .txt file or, if a sample
      has none, the key 'caption'.
    describe: whether to add 'key', the sample's key, and 'columns', the numbers and strings of its
      .json file by name.

  Yields:
    {'picture', 'caption'} of each sample, with b'' for missing parts; or `Damaged` for unreadable
    data. The last sample of a truncated shard is skipped, since it may be incomplete. Files with
    other endings that belong to no sample are `Damaged`, one per key.
  """
  sample, others = _Sample('', caption_key, describe), _Others()
  for member in tar_members.members(file, _WANTED, image_decoding.MAX_BYTES):
    if isinstance(member, Damaged):
      if member == tar_members.REST:
        sample = _Sample('', caption_key, describe)
      yield member
      continue
    key, ending = tar_members.split(member.name)
    if member.content is not None and key != sample.key:
      yield from sample.examples()
      sample = _Sample(key, caption_key, describe)
    yield from others.unclaimed_before(key)
    if member.content is None:
      others.add(member.name)
    else:
      others.claim(key)
      yield from sample.add(_SAME.get(ending, ending), member.content)
  yield from sample.examples()
  yield from others.unclaimed()


class _Sample:
  """Adjacent files of one key; several samples if endings repeat."""

  def __init__(self, key: str, caption_key: str | None, describe: bool):
    self.key = key
    self._caption_key, self._describe = caption_key, describe
    self._files: dict[str, bytes] = {}
    self._ambiguous = False

  def add(self, ending: str, content: bytes) -> Iterator[Mapping[str, Any] | Damaged]:
    """Adds a file, and yields the sample that ends before it, if any."""
    if ending in self._files:
      pictures = sum(picture in self._files for picture in _PICTURES)
      self._ambiguous |= pictures > 1
      yield from self.examples()
      self._ambiguous |= not pictures or not {'txt', 'json'} & self._files.keys()
      self._files = {}
    self._files[ending] = content

  def examples(self) -> Iterator[Mapping[str, Any] | Damaged]:
    """Yields the sample, if there is one."""
    if not self._files:
      return
    picture = next((self._files[ending] for ending in _PICTURES if ending in self._files), b'')
    use_txt = self._caption_key is None and 'txt' in self._files
    if not use_txt and len(self._files.get('json', b'')) > _MAX_JSON:
      yield Damaged('json file of too many bytes in a tar shard', self.key)
      return
    caption = self._files['txt'] if use_txt else self._json_caption()
    if self._ambiguous and caption:
      caption = captions.AMBIGUOUS
    example: dict[str, Any] = {'picture': picture, 'caption': caption}
    if self._describe:
      example |= {'key': self.key, 'columns': self._columns()}
    yield example

  def _columns(self) -> dict[str, Any]:
    """Returns the numbers and strings in the .json file; {} if it can't be read."""
    content = self._files.get('json', b'')
    try:
      found = json.loads(content) if len(content) <= _MAX_JSON else None
    except (ValueError, RecursionError):
      return {}
    if not isinstance(found, dict):
      return {}
    return {name: value for name, value in found.items() if not isinstance(value, (dict, list))}

  def _json_caption(self) -> bytes:
    """Returns the caption in the .json file, or the value for a missing one."""
    missing = b'' if self._caption_key is None else captions.NO_COLUMN
    try:
      row = json.loads(self._files['json'])
      return captions.from_json(row[self._caption_key or 'caption'])
    except (LookupError, ValueError, TypeError, RecursionError):
      return missing


class _Others:
  """Collects files that are neither pictures nor captions until their sample is known.

  The sample x owns x.cls and x.depth.npy, but not y.cls.
  """

  def __init__(self):
    self._begin = ''
    self._names: list[str] = []
    # Ordered by arrival.
    self._keys: dict[str, None] = {}

  def add(self, name: str) -> None:
    """Adds a file."""
    if not self._is_claimed(name):
      self._names.append(name)

  def claim(self, key: str) -> None:
    """Adds the key of a sample."""
    self._keys[key] = None
    if len(self._keys) > _MAX_OTHERS:
      del self._keys[next(iter(self._keys))]

  def unclaimed_before(self, key: str) -> Iterator[Damaged]:
    """Yields files without a sample, once the given key rules out that their sample follows."""
    folder, slash, last = key.rpartition('/')
    begin = folder + slash + last.partition('.')[0]
    if begin != self._begin or len(self._names) > _MAX_OTHERS:
      yield from self.unclaimed()
    if begin != self._begin:
      self._begin, self._keys = begin, {}

  def unclaimed(self) -> Iterator[Damaged]:
    """Yields files without a sample, and forgets them."""
    found: dict[str, str] = {}
    for name in self._names:
      if not self._is_claimed(name):
        found.setdefault(tar_members.split(name)[0], name)
    self._names = []
    for name in found.values():
      yield Damaged('file that is neither picture nor caption in a tar shard', name)

  def _is_claimed(self, name: str) -> bool:
    """Returns whether a name is a sample's key followed by a dot and an ending."""
    folder, slash, last = name.rpartition('/')
    parts = last.split('.', _MAX_DOTS)
    return any(
      folder + slash + '.'.join(parts[:count]) in self._keys for count in range(1, len(parts) + 1)
    )
