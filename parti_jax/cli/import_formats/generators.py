"""Formats of generators."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

from parti_jax.cli.import_formats import formats
from parti_jax.cli.import_formats import text_encoders
from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.data import class_tokenizer
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.importers import dalle_mini
from parti_jax.importers import llamagen
from parti_jax.importers import min_dalle
from parti_jax.importers import tokenizer_files
from parti_jax.models import generators

# Rows of DALL·E mini's table of pieces beyond its vocabulary.
_DALLE_MINI_SPARE_ROWS = 128
# What is done to DALL·E mini's texts unless --text_normalizer says otherwise.
TEXT_NORMALIZER = 'min_dalle'


def _check_generator_tokenizer(
  tokenizer: text_tokenizer.TextTokenizer, config, spare_rows: int = 0
) -> None:
  formats.check_size(tokenizer, config, spare_rows)
  generators.check_empty_text(config, tokenizer.encode('', 3)[0], tokenizer.path)


def _dalle_mini_config(given: formats.Given):
  assert given.image_tokenizer is not None
  sizes = given.image_tokenizer.config
  return dalle_mini.config_of(given.arrays, given.config, sizes.codebook_size, sizes.grid)


def _dalle_mini_start(given: formats.Given, config) -> int:
  settings = dict(given.config or {})
  if (start := given.flags['start_token']) is not None:
    settings['decoder_start_token_id'] = start
  return dalle_mini.first_input(given.arrays, settings, config)


def _text_normalizer(given: formats.Given) -> str:
  return given.flags['text_normalizer'] or TEXT_NORMALIZER


def _llamagen_config(given: formats.Given):
  assert given.image_tokenizer is not None
  tokenizer = given.image_tokenizer.config
  for file in given.weights.files:
    named = re.search(r'_(256|384|512)$', os.path.splitext(os.path.basename(file))[0])
    if named and int(named[1]) != tokenizer.image_size:  # The arrays don't show it.
      raise UserError(
        f'{file} is named as a generator of images of {named[1]} pixels, but the image tokenizer '
        f'makes {tokenizer.image_size}; give its weights with --image_size={named[1]}, or a folder '
        'that was imported so'
      )
  folder, encoder = given.flags['text_encoder'], None
  if folder is not None:
    encoder = model_folder.part_config('text_encoder', folder)
    if given.flags['vocabulary'] is not None:
      raise UserError('--vocabulary: the text tokenizer is that of --text_encoder; leave it out')
  return llamagen.config_of(given.arrays, tokenizer.grid, encoder, given.flags['heads'])


def _llamagen_tokenizer(path: str, given: formats.Given) -> formats.TokenizerFile:
  """Returns the text tokenizer of a text encoder, or the names of classes, if they are given."""
  if (folder := given.flags['text_encoder']) is not None:
    part = model_folder.load_part('text_encoder', folder)
    if part.vocabulary_path is None:
      raise UserError(f'{folder} has no text tokenizer; import the text encoder again')
    return formats.TokenizerFile(text_tokenizer.read_file(part.vocabulary_path), part.lower_case)
  count = llamagen.class_count(given.arrays)
  names = None if given.flags['vocabulary'] is None else class_names.read(path)
  return formats.TokenizerFile(class_tokenizer.content(count, names))


def _llamagen_default(folder: str, given: formats.Given) -> str:
  del folder
  if (encoder := given.flags['text_encoder']) is not None:
    return f'the vocabulary of {encoder}'
  return 'the numbers of the classes; --vocabulary gives them names'


def _check_llamagen_tokenizer(tokenizer: text_tokenizer.TextTokenizer, config) -> None:
  spare_rows = 0 if config.text_encoder is None else text_encoders.T5_SPARE_ROWS
  _check_generator_tokenizer(tokenizer, config, spare_rows)


def _text_encoder_of_llamagen(given: formats.Given, config) -> Mapping[str, Any]:
  del config
  folder = given.flags['text_encoder']
  if folder is None:
    return {}
  return {'text_encoder': model_folder.load_part('text_encoder', folder).params}


def _described_generator(config, count: int) -> str:
  classes = getattr(config, 'classes', None)
  condition = f'{config.text_length} text tokens' if classes is None else f'{classes:,} classes'
  return (
    f'a generator of {count:,} parameters, {config.decoder_layers} decoder layers of width '
    f'{config.width}, {condition}'
  )


_DALLE_MINI = formats.Format(
  _dalle_mini_config,
  lambda given, config: dalle_mini.key_map(config, given.arrays, _dalle_mini_start(given, config)),
  lambda given: (),
  flags=('tokenizer', 'image_size', 'vocabulary', 'config', 'text_normalizer', 'start_token'),
  tokenizer=formats.Tokenizer(
    "DALL·E mini's tokenizer.json, or a folder with its vocab.json and merges.txt",
    lambda path, given: formats.TokenizerFile(
      tokenizer_files.of_dalle_mini(path, _text_normalizer(given))
    ),
    functools.partial(_check_generator_tokenizer, spare_rows=_DALLE_MINI_SPARE_ROWS),
    default=lambda folder, given: f'the vocabulary in {folder}',
  ),
  config_file='config.json',
  # The authors' notebook.
  sampling=lambda _: sampling_settings.SamplingSettings(guidance_scale=10.0),
  origin=lambda given, config: {
    'start_token': _dalle_mini_start(given, config),
    'text_normalizer': _text_normalizer(given),
  },
  image_tokenizer='dalle-mini',
)


PART = formats.Part(
  {
    'dalle-mini': _DALLE_MINI,
    'min-dalle': _DALLE_MINI._replace(open=min_dalle.open_weights),
    'llamagen': formats.Format(
      _llamagen_config,
      lambda given, config: llamagen.key_map(config, given.arrays),
      lambda given: llamagen.ignored(given.arrays),
      flags=('tokenizer', 'image_size', 'vocabulary', 'text_encoder', 'heads'),
      tokenizer=formats.Tokenizer(
        'names of the classes, such as LOC_synset_mapping.txt or imagenet_class_index.json',
        _llamagen_tokenizer,
        _check_llamagen_tokenizer,
        default=_llamagen_default,
      ),
      # Those of sample_c2i.py and sample_t2i.py.
      sampling=lambda config: (
        sampling_settings.SamplingSettings(guidance_scale=4.0, top_k=2000)
        if config.text_encoder is None
        else sampling_settings.SamplingSettings(guidance_scale=7.5, top_k=1000)
      ),
      others=_text_encoder_of_llamagen,
      provenance=lambda given: (
        {}
        if given.flags['text_encoder'] is None
        else model_folder.part_provenance('text_encoder', given.flags['text_encoder'])
      ),
      image_tokenizer='llamagen',
    ),
  },
  _described_generator,
  '--model={} of `parti-jax generate` and other commands',
)
