"""Prepares one example: filters it, then decodes, resizes and encodes its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from parti_jax.data import captions
from parti_jax.data import image_decoding
from parti_jax.data.sources import prepared
from parti_jax.preparation import filters
from parti_jax.preparation import hashes
from parti_jax.preparation import pictures
from parti_jax.preparation import similarity
from parti_jax.preparation.settings import Settings


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared example, kept unless it is a duplicate.

  Attributes:
    record: the result of `prepared.serialized`.
    digest: digest for finding exact duplicates; b'' if they aren't removed.
    look: perceptual hash for finding near duplicates; None for none.
    pixels: pixels of the picture before resizing.
    notes: a short note for each thing that was ignored or cut.
    pair: what the similarity of picture and caption is computed from; None if it isn't.
  """

  record: bytes
  digest: bytes
  look: int | None
  pixels: int
  notes: list[str]
  pair: similarity.Pair | None = None


def prepare(
  example: Mapping[str, Any], default_key: str, settings: Settings, to_srgb: bool = True
) -> Prepared:
  """Prepares an example.

  The cheapest filters run first, so most rejected pictures are never decoded.

  Args:
    example: an example of `Source.open_described`.
    default_key: the key for an example without one.
    settings: filters, size and format.
    to_srgb: whether colors are converted to sRGB if the file has a color profile.

  Raises:
    Unusable: a filter rejects the example.
  """
  columns, data = example.get('columns', {}), example['picture']
  filters.check_columns(columns, settings)
  caption, notes = captions.clean(example['caption'])
  filters.check_caption(caption, settings)
  header = image_decoding.header(data)
  filters.check_sides(header.width, header.height, settings)
  image, more = pictures.decode(data, header, settings, to_srgb)
  encoded = pictures.encode(image, data, header, settings)
  if settings.keep_columns is not None:
    columns = {name: columns[name] for name in settings.keep_columns if name in columns}
  description = {
    'key': example.get('key') or default_key,
    'columns': columns,
    'width': header.width,
    'height': header.height,
  }
  digest = b''
  if settings.duplicates is not None:
    digest = hashes.digest(data, caption if settings.duplicates != 'picture' else '')
  look = hashes.perceptual(image) if settings.near_duplicates is not None else None
  return Prepared(
    prepared.serialized(encoded, caption, description),
    digest,
    look,
    header.width * header.height,
    notes + more,
    similarity.pair(image, caption, settings),
  )
