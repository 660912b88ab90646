"""`parti-jax import`: turns public weights of a part into a folder that all commands can use."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import tqdm

from parti_jax.cli import importable_parts
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.importers import key_map


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument('part', choices=list(importable_parts.PARTS), help='what the weights are of')
  parser.add_argument(
    'files',
    nargs='+',
    metavar='FILE',
    help='the weights: safetensors, Flax msgpack, npz or torch; a file, its shards or their folder',
  )
  parser.add_argument(
    '--format',
    required=True,
    choices=importable_parts.FORMATS,
    help='the family of the weights, see docs/import.md; the files do not record it: '
    + '; '.join(
      f'of a {name.replace("_", " ")} {", ".join(part.formats)}'
      for name, part in importable_parts.PARTS.items()
    ),
  )
  parser.add_argument('--output_dir', required=True, metavar='FOLDER', help='the folder to write')
  parser.add_argument(
    '--overwrite', action='store_true', help='replace an existing folder of a part there'
  )
  parser.add_argument(
    '--dtype',
    choices=sorted(model_folder.STORED_DTYPES),
    default='float32',
    help='dtype of the stored parameters (default: %(default)s)',
  )
  parser.add_argument(
    '--source',
    metavar='TEXT',
    help='where the weights come from, such as a URL; kept in the folder',
  )
  parser.add_argument('--licence', metavar='TEXT', help='their licence; kept in the folder')
  tokenizer = parser.add_argument_group('tokenizer')
  tokenizer.add_argument(
    '--image_size',
    type=int,
    metavar='PIXELS',
    help='height and width of the images to encode and decode (default: 256)',
  )
  tokenizer.add_argument(
    '--pixel_range',
    type=float,
    nargs=2,
    metavar=('BLACK', 'WHITE'),
    help="what black and white are to the network (default: the format's)",
  )
  ranker = parser.add_argument_group('ranker and text encoder')
  ranker.add_argument(
    '--vocabulary',
    metavar='FILE',
    help="the network's text tokenizer: CLIP's tokenizer.json or a folder with its vocab.json and "
    "merges.txt; for siglip2 its tokenizer.json or Gemma's tokenizer.model; for t5 its spiece.model",
  )
  ranker.add_argument(
    '--config',
    metavar='FILE',
    help='the config.json of the weights, of open_clip the open_clip_config.json (default: the one '
    'next to the weights, if there is one)',
  )
  ranker.add_argument(
    '--preprocessor',
    metavar='FILE',
    help='their preprocessor_config.json (default: the one next to the weights, if there is one)',
  )
  ranker.add_argument(
    '--activation',
    choices=('quick_gelu', 'gelu'),
    help="the activation of a CLIP whose config isn't there: quick_gelu of OpenAI, DFN and MetaCLIP, "
    'gelu of most others',
  )
  ranker.add_argument(
    '--text_length',
    type=int,
    metavar='TOKENS',
    help='maximum number of text tokens of a T5 (default: 128)',
  )
  upscaler = parser.add_argument_group('super-resolution')
  upscaler.add_argument(
    '--interpolate_with',
    metavar='FILE',
    help='weights of the same network, such as realesr-general-wdn-x4v3.pth; the folder gets '
    'weights between both',
  )
  upscaler.add_argument(
    '--denoise_strength',
    type=float,
    metavar='SHARE',
    help='share of the first weights in them, from 0 to 1 (default: '
    f'{importable_parts.DENOISE_STRENGTH})',
  )


def run(args: argparse.Namespace) -> int:
  """Writes the folder; returns the exit status."""
  found = importable_parts.find(args)
  model_folder.check_target(args.output_dir, args.overwrite, args.part)
  given = importable_parts.open_files(args, found)
  config = found.config_of(given)
  how = found.preprocessing(given, config)
  sources = found.key_map(given, config)
  expected = parameter_files.shapes(model_folder.abstract(args.part, config))
  key_map.check(sources, given.arrays, expected, ', '.join(args.files), tuple(found.ignored(given)))
  with contextlib.ExitStack() as stack:
    path, lower_case = stack.enter_context(_text_tokenizer(found, config, args.vocabulary))
    bar = stack.enter_context(
      tqdm.tqdm(desc='converting', total=len(sources), unit='array', disable=None)
    )
    # Each is read when it is written, so that memory holds one at a time.
    params = key_map.convert(sources, given.arrays, bar.update)
    tree = flax.traverse_util.unflatten_dict(params, sep='/')
    folder = model_folder.save_part(
      args.output_dir,
      args.part,
      model_folder.Part(
        config, tree, vocabulary_path=path, preprocessing=how, lower_case=lower_case
      ),
      {args.part: _origin(args, given)},
      dtype=args.dtype,
      overwrite=args.overwrite,
    )
  part = importable_parts.PARTS[args.part]
  count = sum(math.prod(shape) for shape in expected.values())
  print(f'{folder}: {part.described(config, count)}; use it as {part.use.format(folder)}')
  return 0


@contextlib.contextmanager
def _text_tokenizer(
  found: importable_parts.Format, config: Any, given: str | None
) -> Iterator[tuple[pathlib.Path | None, bool]]:
  """Checks the text tokenizer that is given, and yields its file to store, and `Part.lower_case`.

  The path is None if the network has no text tokenizer.
  """
  if found.tokenizer is None or given is None:
    yield None, False
    return
  storage.check_local(given)
  try:
    content, lower_case = found.tokenizer.read(given)
  except UserError as error:
    raise UserError(f'--vocabulary: {error}; give {found.tokenizer.files}') from error
  with tempfile.TemporaryDirectory(prefix='parti_jax_import_') as folder:
    path = pathlib.Path(folder, 'vocabulary')
    path.write_bytes(content)
    try:
      found.tokenizer.check(text_tokenizer.open_tokenizer(path, lower_case), config)
    except UserError as error:
      raise UserError(str(error).replace(str(path), given)) from error
    yield path, lower_case


def _origin(args: argparse.Namespace, given: importable_parts.Given) -> dict[str, Any]:
  """Returns what the folder keeps about the origin of the weights."""
  origin = {
    'source': args.source,
    'licence': args.licence,
    'format': args.format,
    'files': [os.path.basename(file) for file in given.weights.files],
    'sha256': given.weights.digest(),
  }
  if args.interpolate_with is not None:
    strength = args.denoise_strength
    origin['denoise_strength'] = importable_parts.DENOISE_STRENGTH if strength is None else strength
  return {name: value for name, value in origin.items() if value not in (None, '')}
