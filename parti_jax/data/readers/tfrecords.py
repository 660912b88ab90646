"""Reads TFRecords record by record; skips damaged records and reads the rest.

TensorFlow's own reader stops at the first damaged record.
"""

import functools
import itertools
import struct
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import IO

import google_crc32c

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import image_decoding
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import packed

# A usable picture and the data that comes with it.
MAX_BYTES = image_decoding.MAX_BYTES + 2**20
# Maximum bytes of a text that is read as a column.
_MAX_COLUMN = 2**16
# Limits of the search for keys.
_FILES_LOOKED_AT, _RECORDS_LOOKED_AT = 8, 100

_REST = Damaged('rest of a damaged TFRecord file')


def records(file: IO[bytes]) -> Iterator[bytes | Damaged]:
  """Yields the records of a file.

  Args:
    file: a file open for reading at its beginning.

  Yields:
    Each record, or `Damaged` in its place. After a record with a wrong checksum, reading continues
    with the next. A damaged length ends the reading, since it hides where the next record begins.
  """
  try:
    while header := file.read(12):
      if len(header) < 12 or _checksum(header[:8]) != header[8:]:
        yield _REST
        return
      (length,) = struct.unpack('<Q', header[:8])
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
      yield record if _checksum(record) == content[-4:] else Damaged('record with a wrong checksum')
  except OSError:
    yield _REST


def unpacked(file: IO[bytes]) -> IO[bytes]:
  """Returns a stream of a file's records, plain or packed with zlib or a format of `packed`."""
  head = file.read(12)
  file.seek(0)
  if len(head) == 12 and _checksum(head[:8]) == head[8:]:
    # A valid header; the length of a first record could look like any packing.
    return file
  if head[:1] == b'\x78' and int.from_bytes(head[:2]) % 31 == 0:
    return packed.unpacked_zlib(file)
  return packed.unpacked(file)


def raw(path: str) -> Iterator[Mapping[str, bytes] | Damaged]:
  """Yields the records of a file as {'record': bytes}, or `Damaged` in their place."""
  with storage.open_file(path) as file:
    for record in records(unpacked(file)):
      yield record if isinstance(record, Damaged) else {'record': record}


def examples(
  path: str, keys: Mapping[str, str], describe: bool = False
) -> Iterator[Mapping[str, Any] | Damaged]:
  """Yields the tf.train.Examples of a file.

  Args:
    path: the file.
    keys: name -> the feature to read it from.
    describe: whether to add 'columns', the features that are a single number or short string, and
      'key', the string of the feature of this name.

  Yields:
    {name: bytes}, with b'' for a missing feature, or `Damaged` in the example's place. A caption
    that isn't a single string becomes one of the placeholders of `captions`.
  """
  with storage.open_file(path) as file:
    for record in records(unpacked(file)):
      yield record if isinstance(record, Damaged) else parsed(record, keys, describe)


def parsed(
  record: bytes, keys: Mapping[str, str], describe: bool = False
) -> Mapping[str, Any] | Damaged:
  """Returns features of a serialized tf.train.Example, in the form that `examples` yields."""
  features = features_of(record)
  if features is None:
    return Damaged('record that is not a tf.train.Example')
  example: dict[str, Any] = {}
  for name, key in keys.items():
    # Looking up a missing key would add it.
    feature = features[key] if key in features else None
    values = feature.bytes_list.value if feature is not None else []
    if feature is not None and feature.WhichOneof('kind') not in (None, 'bytes_list'):
      example[name] = captions.NUMBERS
    elif len(values) > 1:
      example[name] = captions.SEVERAL
    else:
      example[name] = values[0] if values else b''
  if example.get('picture') == captions.NUMBERS:
    return Damaged('record with numbers in place of a picture')
  if example.get('picture') == captions.SEVERAL:
    return Damaged('record with more than one picture')
  if describe:
    columns = _columns(features, set(keys.values()))
    example |= {'key': str(columns.get('key', '')), 'columns': columns}
  return example


def _columns(features: Mapping[str, Any], others: Collection[str]) -> dict[str, float | str]:
  """Returns the features that are a single number or short string, except for some others."""
  found: dict[str, float | str] = {}
  for name, feature in features.items():
    kind = feature.WhichOneof('kind')
    values: Sequence[Any] = getattr(feature, kind).value if kind and name not in others else ()
    if len(values) == 1 and kind != 'bytes_list':
      found[name] = values[0]
    elif len(values) == 1 and len(values[0]) <= _MAX_COLUMN:
      found[name] = values[0].decode('utf-8', 'replace')
  return found


def check_keys(files: Sequence[str], keys: Mapping[str, str]) -> None:
  """Checks that the first records have some keys, since a wrong key affects all of them.

  Args:
    files: files of a split.
    keys: gin parameter -> key.

  Raises:
    UserError: the files aren't TFRecords of tf.train.Example, or none of the first records has
      bytes under one of the keys.
  """
  missing, damaged = dict(keys), ''
  present: set[str] = set()
  numbers: set[str] = set()
  for file in files[:_FILES_LOOKED_AT]:
    for features in _first_features(file):
      if features is None:
        damaged = damaged or file
        continue
      kinds = {key: value.WhichOneof('kind') for key, value in features.items()}
      present.update(key for key, kind in kinds.items() if kind)
      numbers.update(key for key, kind in kinds.items() if kind not in (None, 'bytes_list'))
      missing = {
        parameter: key
        for parameter, key in missing.items()
        if kinds.get(key) != 'bytes_list' or not features[key].bytes_list.value
      }
      if not missing:
        return
    if present:
      break
  if damaged and not present:
    raise UserError(f'tfrecord: {damaged} does not hold TFRecords of tf.train.Example')
  for parameter, key in missing.items() if present else ():
    gin = f'(gin: tfrecord.{parameter})'
    if key in numbers:
      raise UserError(f'tfrecord: {key!r} in {file} holds numbers {gin}')
    raise UserError(
      f'tfrecord: no {key!r} in the first records of {file}, which have '
      f'{", ".join(sorted(present)[:50])} {gin}'
    )


def _first_features(file: str) -> Iterator[Mapping | None]:
  """Yields the features of the first records; None for unreadable ones."""
  try:
    with storage.open_file(file) as opened:
      for record in itertools.islice(records(unpacked(opened)), _RECORDS_LOOKED_AT):
        yield None if isinstance(record, Damaged) else features_of(record)
  except OSError:
    yield None


def features_of(record: bytes) -> Mapping | None:
  """Returns the features of a serialized tf.train.Example; None if it isn't one."""
  try:
    return _example().FromString(record).features.feature
  except Exception:  # protobuf's error class differs among its implementations.
    return None


@functools.cache
def _example():
  # tensorflow-datasets provides the message without TensorFlow.
  from tensorflow_datasets.proto import tf_example_generated_pb2

  return tf_example_generated_pb2.Example


def _checksum(data: bytes) -> bytes:
  """Returns the masked CRC-32C of a TFRecord."""
  value = google_crc32c.value(data)
  masked = ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
  return masked.to_bytes(4, 'little')


def _skip(file: IO[bytes], count: int) -> bool:
  """Skips bytes by reading, and returns whether `count` bytes were available."""
  while count:
    piece = len(file.read(min(count, 2**20)))
    if not piece:
      return False
    count -= piece
  return True
