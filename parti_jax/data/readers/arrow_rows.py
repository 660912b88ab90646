"""Reads captioned pictures from the Arrow tables of Parquet files and Hugging Face datasets.

A picture is an encoded file in a column of bytes, or of structs with a field 'bytes', as the
Hugging Face hub writes them. A caption is a string, its bytes in UTF-8, or a list of one of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data.damage import Damaged

# Column names to try if gin sets none, in any case; the first match is used.
PICTURE_KEYS = ('image', 'jpg', 'jpeg', 'png', 'webp', 'picture', 'img', 'photo', 'image_bytes')
CAPTION_KEYS = ('caption', 'text', 'captions', 'description', 'prompt', 'txt', 'alt_text')
# img2dataset's statuses of missing pictures.
_STATUSES = ('failed_to_download', 'failed_to_resize')
_NO_PICTURE = Damaged('row without a picture')
_PATH = Damaged('row with a path in place of a picture')
_MOST_SHOWN = 50


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns of a table to read.

  Attributes:
    caption: name of the captions' column.
    picture: name of the pictures' column; None if pictures aren't needed.
    nested: whether its values are structs.
    status: name of img2dataset's column with the reason of a missing picture; None if it has none.
  """

  caption: str
  picture: str | None = None
  nested: bool = False
  status: str | None = None

  @property
  def paths(self) -> list[str]:
    """The column paths for a Parquet reader."""
    picture = f'{self.picture}.bytes' if self.nested else self.picture
    return [name for name in (picture, self.caption, self.status) if name is not None]

  @property
  def names(self) -> list[str]:
    """The names of the columns."""
    return [name for name in (self.picture, self.caption, self.status) if name is not None]


def find(
  schema: pa.Schema,
  source: str,
  where: str,
  image_key: str | None,
  caption_key: str | None,
  pictures: bool = True,
) -> Columns:
  """Finds the columns to read.

  Args:
    schema: schema of the table.
    source: name of the source, for messages.
    where: the file, for messages.
    image_key: column of the pictures; None for one of `PICTURE_KEYS`.
    caption_key: column of the captions; None for one of `CAPTION_KEYS`.
    pictures: whether pictures are needed.

  Raises:
    UserError: a column doesn't exist, its name isn't unique, or it has the wrong type.
  """
  caption = _named(schema, source, where, 'caption_key', caption_key, CAPTION_KEYS)
  kind = schema.field(caption).type
  if not (_is_text(kind) or _is_list(kind) and _is_text(kind.value_type)):
    raise UserError(
      f'{source}: the column {caption!r} of {where} holds {_shown(kind)}, not text '
      f'(gin: {source}.caption_key)'
    )
  if not pictures:
    return Columns(caption)
  picture = _named(schema, source, where, 'image_key', image_key, PICTURE_KEYS)
  kind = schema.field(picture).type
  nested = pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0
  if not (_is_bytes(kind) or nested and _is_bytes(kind.field('bytes').type)):
    raise UserError(
      f'{source}: the column {picture!r} of {where} holds {_shown(kind)}, not '
      f'encoded pictures (gin: {source}.image_key)'
    )
  has_status = schema.get_field_index('status') >= 0 and _is_text(schema.field('status').type)
  return Columns(caption, picture, nested, 'status' if has_status else None)


def has_pictures(schema: pa.Schema) -> bool:
  """Returns whether a table has columns of pictures and captions with well-known names."""
  try:
    find(schema, '', '', None, None)
    return True
  except UserError:
    return False


def _named(
  schema: pa.Schema, source: str, where: str, parameter: str, key: str | None, known: Sequence[str]
) -> str:
  """Returns the name of a column."""
  shown = ', '.join(schema.names[:_MOST_SHOWN]) or 'none'
  found = [key] if key is not None and key in schema.names else []
  if key is None:
    names = {name.lower(): name for name in reversed(schema.names)}
    found = [names[name] for name in known if name in names]
  if not found:
    what = f'no column {key!r}' if key is not None else f'none of the columns {", ".join(known)}'
    raise UserError(
      f'{source}: {where} has {what}; its columns are {shown} (gin: {source}.{parameter})'
    )
  if schema.names.count(found[0]) > 1:
    raise UserError(f'{source}: {where} has several columns {found[0]!r}; rename all but one')
  if len(found) > 1:
    logging.log_first_n(
      logging.WARNING,
      '%s: using the first of the columns %s (gin: %s.%s)',
      1,
      where,
      ', '.join(found),
      source,
      parameter,
    )
  return found[0]


def _is_bytes(kind: pa.DataType) -> bool:
  return (
    pa.types.is_binary(kind)
    or pa.types.is_large_binary(kind)
    or pa.types.is_binary_view(kind)
    or pa.types.is_fixed_size_binary(kind)
  )


def _is_text(kind: pa.DataType) -> bool:
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  return (
    _is_bytes(kind)
    or pa.types.is_string(kind)
    or pa.types.is_large_string(kind)
    or pa.types.is_string_view(kind)
    or pa.types.is_null(kind)
  )


def _is_list(kind: pa.DataType) -> bool:
  return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _shown(kind: pa.DataType) -> str:
  text = ' '.join(str(kind).split())
  return text if len(text) <= 100 else f'{text[:97]}...'


class Batch:
  """Consecutive rows of a table.

  Args:
    batch: the rows, with the columns of `columns.names`.
    columns: the columns to read.

  Attributes:
    nbytes: bytes of memory.
  """

  def __init__(self, batch: pa.RecordBatch, columns: Columns):
    self.nbytes = batch.nbytes
    self._count, self._statuses, self._pictures = batch.num_rows, None, None
    self._has_struct = None
    self._captions = _as_bytes(batch.column(columns.caption))
    if columns.picture is not None:
      pictures = batch.column(columns.picture)
      if columns.nested:
        self._has_struct, pictures = pictures, pc.struct_field(pictures, 'bytes')
      self._pictures = pictures
    if columns.status is not None:
      self._statuses = _as_bytes(batch.column(columns.status))

  def __len__(self) -> int:
    return self._count

  def example(self, row: int) -> Mapping[str, bytes] | Damaged:
    """Returns the example of a row, or the reason why it is missing."""
    found = {'caption': _caption(self._captions[row].as_py())}
    if self._pictures is None:
      return found
    picture = self._pictures[row].as_py()
    return self._missing(row) if picture is None else {'picture': picture, **found}

  def _missing(self, row: int) -> Damaged:
    """Returns the reason why a row has no picture."""
    status = self._statuses[row].as_py() if self._statuses is not None else None
    for known in _STATUSES:
      if status == known.encode():
        return Damaged(f'img2dataset: {known}')
    return _PATH if self._has_struct is not None and self._has_struct[row].is_valid else _NO_PICTURE


def _caption(value: bytes | list | None) -> bytes:
  if isinstance(value, list):
    if len(value) > 1:
      return captions.SEVERAL
    value = value[0] if value else None
  return value or b''


def _as_bytes(values: pa.Array) -> pa.Array:
  """Converts strings to bytes, since strings of a damaged file may not be UTF-8."""
  kind = values.type
  if pa.types.is_dictionary(kind):
    return _as_bytes(values.dictionary_decode())
  if _is_list(kind):
    inner = _wide(kind.value_type)
    return values.cast(pa.large_list(inner) if pa.types.is_large_list(kind) else pa.list_(inner))
  return values if _is_bytes(kind) else values.cast(_wide(kind))


def _wide(kind: pa.DataType) -> pa.DataType:
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
