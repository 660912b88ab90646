"""Reads tar shards of samples: files of the same name and different endings.

img2dataset writes 000000012.jpg, 000000012.txt and 000000012.json one after another.
"""

import json
from collections.abc import Iterator, Mapping
from typing import IO

from parti_jax import storage
from parti_jax.data import captions, decoding, tar_members
from parti_jax.data.example_files import Damaged

_PICTURES = ('jpg', 'jpeg', 'png', 'webp', 'gif')
_ENDINGS = frozenset((*_PICTURES, 'txt', 'json'))
# Read whole, JSON takes many times its size.
_MAX_JSON = 2**20


def samples(path: str, caption_key: str) -> Iterator[Mapping[str, bytes] | Damaged]:
  """Reads the shard at a path or URL; see `samples_in`."""
  with storage.open_file(path) as file:
    yield from samples_in(file, caption_key)


def samples_in(file: IO[bytes], caption_key: str) -> Iterator[Mapping[str, bytes] | Damaged]:
  """Reads a shard.

  Args:
    file: the shard, plain or packed with gzip, open to read from its beginning.
    caption_key: the key of the caption in a sample's .json file, used where it has no .txt file.

  Yields:
    {'picture', 'caption'} of each sample, b'' for what it does not have, or what can't be read. Of
    a shard that breaks off the last sample is left out, since it may lack files.
  """
  sample, current = {}, None
  for member in tar_members.members(file, _ENDINGS, decoding.MAX_BYTES):
    if isinstance(member, Damaged):
      if member == tar_members.REST:
        sample = {}
      yield member
      continue
    ending = tar_members.ending(member.name)
    name = member.name[:len(member.name) - len(ending)]
    if name != current:
      if sample:
        yield _example(sample, caption_key)
      sample, current = {}, name
    sample[ending] = member.content
  if sample:
    yield _example(sample, caption_key)


def _example(sample: Mapping[str, bytes], caption_key: str) -> Mapping[str, bytes] | Damaged:
  if 'txt' not in sample and len(sample.get('json', b'')) > _MAX_JSON:
    return Damaged('json file of too many bytes in a tar shard')
  picture = next((sample[ending] for ending in _PICTURES if ending in sample), b'')
  return {'picture': picture, 'caption': _caption(sample, caption_key)}


def _caption(sample: Mapping[str, bytes], caption_key: str) -> bytes:
  """Returns the caption of a sample, b'' where it has none."""
  if 'txt' in sample:
    return sample['txt']
  try:
    return captions.from_json(json.loads(sample.get('json', b'{}')).get(caption_key))
  except (ValueError, AttributeError, RecursionError):
    return b''
