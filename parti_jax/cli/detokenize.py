"""`parti-jax detokenize`: decodes image tokens that another program, such as t5x.infer, sampled."""

from __future__ import annotations

import argparse
import hashlib
import pathlib
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tqdm

from parti_jax.cli import generate
from parti_jax.core import checks
from parti_jax.core import compilation_cache
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.sampling import detokenizing
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import sheets
from parti_jax.sampling import text_to_image
from parti_jax.t5x import inferences
from parti_jax.training.objectives import frozen_tokenizer

# Pictures to decode between two updates of the bar.
_AT_ONCE = 64
# Maximum lines on the grid; all lines of a large file would not fit in memory.
_SHOWN = 120


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument(
    'files',
    nargs='+',
    metavar='FILE',
    help='JSON lines with image tokens, written by t5x.infer',
  )
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    '--model',
    metavar='PATH',
    help='the exported model whose tokenizer made the tokens (default: the demo model)',
  )
  which.add_argument('--tokenizer', metavar='RUN', help='run of the tokenizer that made the tokens')
  parser.add_argument(
    '--output_dir',
    default=generate.DEFAULT_OUTPUT_DIR,
    metavar='DIR',
    help='output folder of the pictures (default: ./%(default)s)',
  )
  parser.add_argument(
    '--field',
    default=inferences.FIELD,
    metavar='NAME',
    help="a line's field with the tokens (default: %(default)s)",
  )
  parser.add_argument(
    '--caption_field',
    default=inferences.CAPTION_FIELD,
    metavar='NAME',
    help="the field of a line's inputs with the caption (default: %(default)s)",
  )
  parser.add_argument(
    '--num_columns',
    type=int,
    default=6,
    metavar='N',
    help='number of lines side by side on the grid (default: %(default)s)',
  )


def run(args: argparse.Namespace) -> int:
  """Writes the pictures of each file and a grid of them, and prints the file names.

  It writes nothing before it has read and checked all lines.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, an invalid file or line, tokens of another tokenizer, no tokenizer, or a
      folder that can't be written.
  """
  checks.count('--num_columns', args.num_columns)
  folder = pathlib.Path(args.output_dir)
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--output_dir {folder} is a file; choose a folder')
  compilation_cache.enable()
  source = args.tokenizer or args.model or text_to_image.DEMO_FOLDER
  tokenizer = frozen_tokenizer.load(source)
  detokenizer = detokenizing.Detokenizer(tokenizer.config, tokenizer.params)
  found = {
    file: inferences.read(file, detokenizer, args.field, args.caption_field)
    for file in dict.fromkeys(args.files)
  }
  with tqdm.tqdm(
    total=sum(len(lines) * len(lines[0].tokens) for lines in found.values()),
    desc='decoding',
    unit='picture',
    disable=None,
  ) as bar:
    for file, lines in found.items():
      writer = _Writer(folder, storage.name(file), storage.name(source), lines)
      for path in writer.pictures(detokenizer, bar):
        tqdm.tqdm.write(str(path))  # Prints above the bar.
      tqdm.tqdm.write(str(writer.grid(args.num_columns)))
  return 0


class _Writer:
  """Writes the pictures of a file's lines."""

  def __init__(
    self, folder: pathlib.Path, file: str, tokenizer: str, lines: Sequence[inferences.Inference]
  ):
    """Creates a writer.

    Args:
      folder: output folder.
      file: name of the file.
      tokenizer: name of the tokenizer.
      lines: the file's lines.
    """
    self._folder, self._file, self._lines = folder, file, lines
    self._metadata = {'inferences': file, 'model': tokenizer}
    # The pictures of each of the first lines.
    self._shown: list[list[np.ndarray]] = []

  def pictures(
    self, detokenizer: detokenizing.Detokenizer, bar: tqdm.tqdm
  ) -> Iterator[pathlib.Path]:
    """Decodes and writes the pictures, and yields their paths in order."""
    count = len(self._lines[0].tokens)
    together = max(1, _AT_ONCE // count)
    for start in range(0, len(self._lines), together):
      lines = self._lines[start : start + together]
      images = detokenizer(np.concatenate([line.tokens for line in lines]))
      images = images.reshape(len(lines), count, *images.shape[1:])
      self._shown += [list(row) for row in images[: max(0, _SHOWN - len(self._shown))]]
      for line, row in zip(lines, images):
        for index, image in enumerate(row):
          yield self._save(line, index, image)
      bar.update(len(lines) * count)

  def _save(self, line: inferences.Inference, index: int, image: np.ndarray) -> pathlib.Path:
    digits = len(str(self._lines[-1].line))  # Sorts the files in the order of the lines.
    name = f'{images_lib.slug(line.caption or "")}_line{line.line:0{digits}}_{index}'
    caption = {} if line.caption is None else {'prompt': line.caption}
    return images_lib.save(
      self._folder,
      name,
      images_lib.to_pil(image),
      {
        **caption,
        **self._metadata,
        'line': str(line.line),
        'image_index': str(index),
        'tokens': _digest(line.tokens[index]),
      },
    )

  def grid(self, num_columns: int) -> pathlib.Path:
    """Writes the first lines' pictures from `pictures` on one sheet and returns its path."""
    lines = self._lines[: len(self._shown)]
    texts = [f'line {line.line}' if line.caption is None else line.caption for line in lines]
    title = f'{self._file}: {len(lines):,} of {len(self._lines):,} lines'
    sheet = sheets.sheet(title, texts, self._shown, num_columns)
    return images_lib.save(
      self._folder,
      f'{images_lib.slug(self._file)}_grid',
      sheet,
      {
        **self._metadata,
        'prompt': '\n'.join(texts),
        'num_columns': str(num_columns),
        'tokens': _digest(*(line.tokens for line in lines)),
      },
    )


def _digest(*tokens: np.ndarray) -> str:
  """Returns a hexadecimal digest of image tokens, which identifies a picture."""
  return hashlib.sha256(b''.join(part.tobytes() for part in tokens)).hexdigest()[:16]
