"""`parti-jax import`: turns public weights into a folder that all commands can use."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import tqdm

from parti_jax.cli import importable_parts
from parti_jax.cli.import_formats import formats
from parti_jax.cli.import_formats import generators
from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import dalle_mini_texts
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder


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
    help='the family of the weights, which the files do not record (see docs/import.md). '
    + '; '.join(
      f'{name}: {", ".join(part.formats)}' for name, part in importable_parts.PARTS.items()
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
  _add_tokenizer(parser.add_argument_group('tokenizer'))
  _add_text(parser.add_argument_group('generator, ranker and text encoder'))
  _add_generator(parser.add_argument_group('generator'))
  _add_super_resolution(parser.add_argument_group('super-resolution'))


def _add_tokenizer(group: argparse._ArgumentGroup):
  """Adds the flags of an image tokenizer."""
  group.add_argument(
    '--image_size',
    type=int,
    metavar='PIXELS',
    help='height and width of the images to encode and decode (default: 256)',
  )
  group.add_argument(
    '--pixel_range',
    type=float,
    nargs=2,
    metavar=('BLACK', 'WHITE'),
    help="the values of black and white in the network's input (default: the format's)",
  )


def _add_text(group: argparse._ArgumentGroup):
  """Adds the flags of networks that read texts."""
  group.add_argument(
    '--vocabulary',
    metavar='FILE',
    help="the network's text tokenizer: CLIP's tokenizer.json or a folder with its vocab.json and "
    "merges.txt; for siglip2 its tokenizer.json or Gemma's tokenizer.model; for t5 its spiece.model; "
    'for dalle-mini as for CLIP (default: the folder of the weights); '
    "for llamagen's weights for classes (c2i) a file of their names (default: only their numbers)",
  )
  group.add_argument(
    '--config',
    metavar='FILE',
    help='the config.json of the weights, of open_clip the open_clip_config.json (default: the one '
    'next to the weights, if there is one)',
  )
  group.add_argument(
    '--preprocessor',
    metavar='FILE',
    help='their preprocessor_config.json (default: the one next to the weights, if there is one)',
  )
  group.add_argument(
    '--activation',
    choices=('quick_gelu', 'gelu'),
    help="the activation of a CLIP whose config isn't there: quick_gelu of OpenAI, DFN and MetaCLIP, "
    'gelu of most others',
  )
  group.add_argument(
    '--text_length',
    type=int,
    metavar='TOKENS',
    help='maximum number of text tokens of a T5 (default: 128)',
  )


def _add_generator(group: argparse._ArgumentGroup):
  """Adds the flags of a generator."""
  group.add_argument(
    '--tokenizer',
    metavar='PATH',
    help='its image tokenizer: a folder that `parti-jax import tokenizer` or `export` wrote, or weights '
    'of the format dalle-mini (for dalle-mini and min-dalle) or llamagen',
  )
  group.add_argument(
    '--text_encoder',
    metavar='FOLDER',
    help="the text encoder of llamagen's weights for texts (t2i): a folder that `parti-jax import "
    'text_encoder` wrote',
  )
  group.add_argument(
    '--heads',
    type=int,
    metavar='NUMBER',
    help="number of attention heads of llamagen's weights, if no published model has their width",
  )
  group.add_argument(
    '--text_normalizer',
    choices=tuple(dalle_mini_texts.NORMALIZERS),
    help='what is done to the texts of dalle-mini: min_dalle keeps lower-case ASCII; dalle_mini also '
    'makes commas of all punctuation, as in training, and needs the extra dalle_mini '
    f'(default: {generators.TEXT_NORMALIZER})',
  )
  group.add_argument(
    '--start_token',
    type=int,
    metavar='ROW',
    help="the row of dalle-mini's embedding of image tokens that is the first input (default: "
    'decoder_start_token_id of the config)',
  )


def _add_super_resolution(group: argparse._ArgumentGroup):
  """Adds the flags of a super-resolution network."""
  group.add_argument(
    '--interpolate_with',
    metavar='FILE',
    help='weights of the same network to interpolate with, such as realesr-general-wdn-x4v3.pth',
  )
  group.add_argument(
    '--denoise_strength',
    type=float,
    metavar='SHARE',
    help='share of the first weights in the interpolation, from 0 to 1 (default: '
    f'{importable_parts.DENOISE_STRENGTH})',
  )


def run(args: argparse.Namespace) -> int:
  """Writes the folder; returns the exit status."""
  found = importable_parts.find(args)
  whole = args.part == 'generator'
  model_folder.check_target(args.output_dir, args.overwrite, None if whole else args.part)
  given = importable_parts.open_files(args, found)
  network = importable_parts.opened(args.part, found, given)
  config = network.config
  with contextlib.ExitStack() as stack:
    path, lower_case = stack.enter_context(_text_tokenizer(found, config, args.vocabulary, given))
    bar = stack.enter_context(
      tqdm.tqdm(desc='converting', total=len(network.sources), unit='array', disable=None)
    )
    params = network.params(bar.update)
    origin = {args.part: _origin(args, given) | dict(found.origin(given, config))}
    if whole:
      tokenizer = given.image_tokenizer
      assert tokenizer is not None and path is not None
      own = {'tokenizer': tokenizer.fingerprint}
      folder = model_folder.save(
        args.output_dir,
        generator_config=config,
        generator_params=params,
        tokenizer_config=tokenizer.config,
        tokenizer_params=tokenizer.params,
        vocabulary_path=path,
        sampling=found.sampling(config),
        provenance=origin | tokenizer.origin | dict(found.provenance(given)),
        dtype=args.dtype,
        overwrite=args.overwrite,
        made_with={
          'generator': own | {'vocabulary': fingerprints.of_vocabulary(path.read_bytes())},
          'tokenizer': own,
        },
      )
    else:
      how = found.preprocessing(given, config)
      part = model_folder.Part(
        config, params, vocabulary_path=path, preprocessing=how, lower_case=lower_case
      )
      folder = model_folder.save_part(
        args.output_dir, args.part, part, origin, dtype=args.dtype, overwrite=args.overwrite
      )
  kind = importable_parts.PARTS[args.part]
  print(f'{folder}: {kind.described(config, network.size)}; use it as {kind.use.format(folder)}')
  return 0


@contextlib.contextmanager
def _text_tokenizer(
  found: formats.Format,
  config: Any,
  vocabulary: str | None,
  given: formats.Given,
) -> Iterator[tuple[pathlib.Path | None, bool]]:
  """Checks the text tokenizer that is given, and yields its file to store, and `Part.lower_case`.

  The path is None if the network has no text tokenizer.
  """
  if found.tokenizer is not None and found.tokenizer.default is not None and vocabulary is None:
    vocabulary = os.path.dirname(given.weights.files[0]) or '.'
    print(f'parti-jax: using {found.tokenizer.default(vocabulary, given)}', file=sys.stderr)
  if found.tokenizer is None or vocabulary is None:
    yield None, False
    return
  storage.check_local(vocabulary)
  try:
    content, lower_case = found.tokenizer.read(vocabulary, given)
  except UserError as error:
    raise UserError(f'--vocabulary: {error}; give {found.tokenizer.files}') from error
  with tempfile.TemporaryDirectory(prefix='parti_jax_import_') as folder:
    path = pathlib.Path(folder, 'vocabulary')
    path.write_bytes(content)
    try:
      found.tokenizer.check(text_tokenizer.open_tokenizer(path, lower_case), config)
    except UserError as error:
      raise UserError(str(error).replace(str(path), vocabulary)) from error
    yield path, lower_case


def _origin(args: argparse.Namespace, given: formats.Given) -> dict[str, Any]:
  """Returns what the folder keeps about the origin of the weights."""
  origin = {'source': args.source, 'licence': args.licence} | importable_parts.origin_of(given)
  if args.interpolate_with is not None:
    strength = args.denoise_strength
    origin['denoise_strength'] = importable_parts.DENOISE_STRENGTH if strength is None else strength
  return {name: value for name, value in origin.items() if value not in (None, '')}
