"""Text files with one text per line; no pictures."""

from __future__ import annotations

from collections.abc import Mapping

import gin

from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_lines
from parti_jax.data.sources import base
from parti_jax.data.sources import paths


class TextSource(paths.FilesSource):
  """Text files; `configured` describes the arguments."""

  has_pictures = False

  def __init__(self, path: str, splits: Mapping[str, str]):
    super().__init__('text', path, splits)

  def open(self, split: str, pictures: bool = True) -> base.Shards:
    if pictures:
      raise UserError(
        "data.source='text' holds texts without pictures; only the task 'texts' "
        'reads it; for pictures choose another source'
      )
    return paths.Files(self.files(split), text_lines.lines)


@gin.configurable('text')
def configured(
  path: str | None = None, splits: Mapping[str, str] = {'train': '*.txt'}
) -> TextSource:
  """Returns a source of text files with one text per line, plain or packed.

  Args:
    path: the folder of the files.
    splits: file pattern of each split, relative to the folder, in the syntax of `file_patterns`.
  """
  return TextSource(paths.required('text', path), splits)
