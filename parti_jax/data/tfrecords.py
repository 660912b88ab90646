"""Reads TFRecords record by record: what is damaged is left out and the rest is read.

TensorFlow's own reader stops at the first damaged record, and takes as much memory as a record
says that it is long.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import IO

import google_crc32c

from parti_jax import storage
from parti_jax.data import decoding
from parti_jax.data.example_files import Damaged
from parti_jax.data.quiet_tensorflow import tf
from parti_jax.errors import UserError

# A picture that can be used, and what comes with it.
MAX_BYTES = decoding.MAX_BYTES + 2**20

_REST = Damaged('rest of a damaged TFRecord file')


def records(file: IO[bytes]) -> Iterator[bytes | Damaged]:
  """Yields the records of a file.

  Args:
    file: open to read from its beginning.

  Yields:
    Each record, or what is in its place. After a record with a wrong checksum the next one is read;
    where the length of one is damaged, the place of the next is unknown, and that was the last.
  """
  try:
    while header := file.read(12):
      if len(header) < 12 or _checksum(header[:8]) != header[8:]:
        yield _REST
        return
      length, = struct.unpack('<Q', header[:8])
      if length > MAX_BYTES:
        if not _skip(file, length + 4):
          yield _REST
          return
        yield Damaged('record of too many bytes')
        continue
      content = file.read(length + 4)
      if len(content) < length + 4:
        yield _REST
        return
      record = content[:-4]
      yield record if _checksum(record) == content[-4:] else Damaged(
          'record with a wrong checksum')
  except OSError:
    yield _REST


def raw(path: str) -> Iterator[Mapping[str, bytes] | Damaged]:
  """Yields the records of a file as {'record': bytes}, or what is in a record's place."""
  with storage.open_file(path) as file:
    for record in records(file):
      yield record if isinstance(record, Damaged) else {'record': record}


def examples(
    path: str, keys: Mapping[str, str]
) -> Iterator[Mapping[str, bytes] | Damaged]:
  """Yields the tf.train.Examples of a file.

  Args:
    path: the file.
    keys: name -> the feature that it is read from.

  Yields:
    {name: bytes}, b'' for a feature that is not there, or what is in the example's place.
  """
  with storage.open_file(path) as file:
    for record in records(file):
      yield record if isinstance(record, Damaged) else parsed(record, keys)


def parsed(record: bytes, keys: Mapping[str, str]) -> Mapping[str, bytes] | Damaged:
  """Returns features of a serialised tf.train.Example, as `examples` yields them."""
  try:
    features = tf.train.Example.FromString(record).features.feature
  except Exception:  # The protocol buffers' own, which differs among their implementations.
    return Damaged('record that is no tf.train.Example')
  example = {}
  for name, key in keys.items():
    # To look up what is not there would add it.
    feature = features[key] if key in features else None
    if feature is not None and feature.WhichOneof('kind') not in (None, 'bytes_list'):
      return Damaged(f'record with numbers in place of a {name}')
    values = feature.bytes_list.value if feature is not None else []
    if len(values) > 1:
      return Damaged(f'record with more than one {name}')
    example[name] = values[0] if values else b''
  return example


def check_keys(file: str, keys: Mapping[str, str]) -> None:
  """Compares keys with those of a file's first record, where a wrong one is easily seen.

  Args:
    file: the file.
    keys: parameter of gin -> key.

  Raises:
    UserError: these are no TFRecords of tf.train.Example, or have no text under one of the keys.
  """
  try:
    with storage.open_file(file) as opened:
      first = next(records(opened), None)
    if isinstance(first, Damaged):
      raise ValueError(first.reason)
    features = tf.train.Example.FromString(first or b'').features.feature
  except UserError:
    raise
  except Exception as error:
    raise UserError(f'tfrecord: {file} holds no TFRecords of tf.train.Example') from error
  present = ', '.join(sorted(key for key in features if features[key].WhichOneof('kind')))
  for parameter, key in keys.items():
    kind = features[key].WhichOneof('kind') if key in features else None
    if kind not in (None, 'bytes_list'):
      raise UserError(f'tfrecord: {key!r} in {file} holds numbers (gin: tfrecord.{parameter})')
    if first is not None and (kind is None or not features[key].bytes_list.value):
      raise UserError(f'tfrecord: no {key!r} in the first record of {file}, which has {present} '
                      f'(gin: tfrecord.{parameter})')


def _checksum(data: bytes) -> bytes:
  """Returns the masked CRC-32C of a TFRecord."""
  value = google_crc32c.value(data)
  masked = ((value >> 15 | value << 17) + 0xa282ead8) & 0xffffffff
  return masked.to_bytes(4, 'little')


def _skip(file: IO[bytes], count: int) -> bool:
  """Reads on, and returns whether so many bytes were there."""
  while count:
    piece = len(file.read(min(count, 2**20)))
    if not piece:
      return False
    count -= piece
  return True
