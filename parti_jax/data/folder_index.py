"""Reads a captions file: JSON lines with a picture's file and its caption."""

import json
import os

import numpy as np

from parti_jax.data.quiet_tensorflow import tf
from parti_jax.errors import UserError


def read(
    captions_file: str, file_key: str, caption_key: str, pictures: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """Reads and checks a captions file.

  Args:
    captions_file: its path. Blank lines are allowed.
    file_key: the column of the picture's file, a path relative to the captions file's folder.
    caption_key: the column of the caption.
    pictures: whether the pictures are needed, so that each has to be there.

  Returns:
    The paths of the pictures and the captions, both arrays of str [pictures].

  Raises:
    UserError: the file is missing or empty, a line is no JSON object or lacks a column, or a
      picture does not exist. The message names the first such line and says how many more.
  """
  folder = os.path.dirname(captions_file)
  files, captions, problems = [], [], []
  for number, line in enumerate(_lines(captions_file), start=1):
    if line.strip():
      try:
        file, caption = _parse(line, file_key, caption_key)
        path = os.path.join(folder, file)
        if pictures and not tf.io.gfile.exists(path):
          raise ValueError(f'picture {path} does not exist')
        files.append(path)
        captions.append(caption)
      except ValueError as error:
        problems.append(f'line {number}: {error}')
  if problems:
    more = f' (and {len(problems) - 1:,} more such lines)' if len(problems) > 1 else ''
    raise UserError(f'{captions_file}, {problems[0]}{more}')
  if not files:
    raise UserError(f'{captions_file} lists no picture')
  return np.array(files), np.array(captions)


def _lines(captions_file: str):
  """Yields the lines of the file."""
  try:
    with tf.io.gfile.GFile(captions_file) as file:
      yield from file
  except (tf.errors.OpError, UnicodeDecodeError) as error:
    raise UserError(
        f'the captions file {captions_file} cannot be read '
        '(gin: folder.path, folder.splits); it holds JSON lines with file and caption'
    ) from error


def _parse(line: str, file_key: str, caption_key: str) -> tuple[str, str]:
  """Returns a line's file and caption, or raises ValueError."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f'no JSON ({error.msg})') from error
  if not isinstance(row, dict):
    raise ValueError('no JSON object')
  for key, setting in ((file_key, 'file_key'), (caption_key, 'caption_key')):
    if not isinstance(row.get(key), str):
      columns = ', '.join(row) or 'none'
      raise ValueError(
          f'no text in column {key!r}; its columns are {columns} (gin: folder.{setting})'
      )
  return row[file_key], row[caption_key]
