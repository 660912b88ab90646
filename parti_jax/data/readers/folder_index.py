"""Maps pictures to captions: from a file of JSON lines, or from a text file per picture."""

import functools
import itertools
import json
import os

import numpy as np
from absl import logging
from jaxtyping import Shaped

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import image_decoding
from parti_jax.data.readers import file_patterns

_MAX_LINE = 2**24
# Column names kept for messages.
_MAX_COLUMNS = 100


def read(
  folder: str, captions_file: str, file_key: str, caption_key: str, pictures: bool = True
) -> tuple[Shaped[np.ndarray, 'pictures'], Shaped[np.ndarray, 'pictures']]:
  """Reads and checks a captions file.

  Args:
    folder: the folder, a path or URL; all pictures must be inside it.
    captions_file: path of the captions file in the folder, in UTF-8, or in another encoding with a
      byte order mark. Blank lines are allowed.
    file_key: column of the picture's file, a path relative to the captions file's folder.
    caption_key: column of the caption.
    pictures: whether the pictures are needed and must exist.

  Returns:
    The paths of the pictures and the raw captions for `captions.clean`, both arrays of bytes
    objects.

  Raises:
    UserError: the file is missing or empty, no line has the caption's column, a line isn't a JSON
      object or has no file column, or a picture doesn't exist, isn't a file or lies outside of the
      folder. The message quotes the first such line and counts the others.
  """
  path = storage.join(folder, captions_file)
  check = _PicturePaths(folder, os.path.dirname(path))
  files, texts, first, problems, captioned = [], [], '', 0, False
  columns: set[str] = set()
  for number, line in enumerate(_lines(path), start=1):
    if line.strip():
      try:
        row = _parse(line, file_key)
        files.append(os.fsencode(check(row[file_key], pictures)))
        texts.append(captions.from_json(row.get(caption_key)))
        captioned |= caption_key in row
        columns.update(row if len(columns) < _MAX_COLUMNS else ())
      except ValueError as error:
        first = first or f'line {number}: {error}'
        problems += 1
  if problems:
    more = f' (and {problems - 1:,} more such lines)' if problems > 1 else ''
    raise UserError(f'{path}, {first}{more}')
  if not files:
    raise UserError(f'{path} lists no pictures')
  if not captioned:
    raise UserError(
      f'{path}: no line has a column {caption_key!r}; the columns are '
      f'{", ".join(sorted(columns)[:_MAX_COLUMNS])} (gin: folder.caption_key)'
    )
  # Object arrays, since all of numpy's own strings would be as long as the longest.
  return np.array(files, object), np.array(texts, object)


def read_text_files(
  folder: str, pattern: str
) -> tuple[Shaped[np.ndarray, 'pictures'], Shaped[np.ndarray, 'pictures']]:
  """Finds text files with a picture of the same name in their folder, such as 1.txt and 1.jpg.

  Warns about text files without a picture, and pictures in their folders without a text file.

  Args:
    folder: the folder, a path or URL.
    pattern: pattern of the text files within the folder, for `file_patterns`; it ends in .txt.

  Returns:
    The same as `read`; a caption that can't be read is b''.

  Raises:
    UserError: no text file matches, or none of them has a picture.
  """
  texts = file_patterns.files(file_patterns.join(folder, pattern))
  if not texts:
    raise UserError(f'no file matches {pattern!r} in {folder} (gin: folder.path, folder.splits)')
  found = _pictures_of(texts)
  _warn(len(texts) - len(found), 'text file(s) without a picture', folder)
  if not found:
    raise UserError(
      f'none of the {len(texts):,} files that match {pattern!r} in {folder} has a '
      f'picture of the same name with one of .{", .".join(image_decoding.ENDINGS)}'
    )
  texts_of = [_first_bytes(text) for text in found]
  return np.array(list(map(os.fsencode, found.values())), object), np.array(texts_of, object)


def _pictures_of(texts: list[str]) -> dict[str, str]:
  """Returns {text file: its picture}, for the text files that have one."""
  found: dict[str, str] = {}
  bare = 0
  for folder, group in itertools.groupby(texts, key=os.path.dirname):
    pictures: dict[str, str] = {}
    for name in storage.names(folder or '.'):
      stem, ending = os.path.splitext(name)
      if ending[1:].lower() in image_decoding.ENDINGS:
        pictures.setdefault(stem, storage.join(folder, name))
    stems = {text: os.path.splitext(storage.name(text))[0] for text in group}
    found |= {text: pictures[stem] for text, stem in stems.items() if stem in pictures}
    bare += len(pictures.keys() - set(stems.values()))
  _warn(bare, 'picture(s) without a text file', os.path.commonpath(texts))
  return found


def _warn(count: int, what: str, folder: str) -> None:
  if count:
    logging.warning('%s: skipped %d %s', folder, count, what)


def _first_bytes(path: str) -> bytes:
  try:
    with storage.open_file(path) as file:
      return file.read(captions.MAX_BYTES + 1)
  except OSError:
    return b''


class _PicturePaths:
  """Resolves the paths of pictures; raises ValueError for those that must not be read."""

  def __init__(self, root: str, folder: str):
    self._folder = folder
    self._local = not storage.is_url(root)
    self._root = os.path.realpath(root) if self._local else root
    # Most pictures share a few folders.
    self._real_folder = functools.lru_cache(maxsize=1024)(os.path.realpath)

  def __call__(self, file: str, must_exist: bool) -> str:
    if '\0' in file or any('\ud800' <= character <= '\udfff' for character in file):
      raise ValueError(f'{file!r} is not a valid file name')
    if os.path.isabs(file) or storage.is_url(file):
      raise ValueError(f'{file!r} is not a path within the folder')
    path = storage.join(self._folder, file)
    if self._local:
      self._check_local(path, must_exist)
    elif '..' in file.split('/'):
      raise ValueError(f'{file!r} leaves the folder with ..')
    elif must_exist and not storage.exists(path):
      raise ValueError(f'picture {path} does not exist')
    return path

  def _check_local(self, path: str, must_exist: bool) -> None:
    folder, name = os.path.split(path)
    if os.path.islink(path) or name in ('', '.', '..'):
      real = os.path.realpath(path)
    else:
      real = os.path.join(self._real_folder(folder), name)
    if os.path.commonpath([self._root, real]) != self._root:
      raise ValueError(
        f'picture {path} lies outside of {self._root}, in {real}; copy it there, or '
        'set folder.path to a folder that holds both'
      )
    if must_exist and not os.path.isfile(real):
      what = 'is not a file' if os.path.exists(real) else 'does not exist'
      raise ValueError(f'picture {path} {what}')


def _lines(path: str):
  """Yields the lines of a file."""
  try:
    with storage.open_file(path, 'rt') as file:
      while line := file.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
          raise UserError(f'{path} has a line of more than {_MAX_LINE:,} characters')
        yield line
  except FileNotFoundError as error:
    raise UserError(
      f'the captions file {path} does not exist (gin: folder.path, folder.splits); if each picture '
      "has a text file, set --gin.folder.splits=\"{'train': '**/*.txt'}\""
    ) from error
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f'the captions file {path} cannot be read '
      '(gin: folder.path, folder.splits); it holds JSON lines with file and caption, in UTF-8'
    ) from error


def _parse(line: str, file_key: str) -> dict:
  """Returns the object in a line; raises ValueError if it can't be used."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f'not JSON ({error.msg})') from error
  except (ValueError, RecursionError) as error:
    raise ValueError('not readable as JSON') from error
  if not isinstance(row, dict):
    raise ValueError('not a JSON object')
  if not isinstance(row.get(file_key), str):
    raise ValueError(
      f'no string in column {file_key!r}; its columns are '
      f'{", ".join(row) or "none"} (gin: folder.file_key)'
    )
  return row
