"""Formats of text encoders."""

from __future__ import annotations

import dataclasses
import functools

from parti_jax.cli.import_formats import formats
from parti_jax.cli.import_formats import rankers
from parti_jax.data import text_tokenizer
from parti_jax.importers import clip
from parti_jax.importers import t5
from parti_jax.models import text_encoders

# Rows of T5's table of pieces beyond its vocabulary.
T5_SPARE_ROWS = 128


def _t5_config(given: formats.Given):
  config = t5.config_of(given.arrays, given.config)
  length = given.flags['text_length']
  return config if length is None else dataclasses.replace(config, text_length=length)


def _check_text_encoder_tokenizer(
  tokenizer: text_tokenizer.TextTokenizer, config, spare_rows: int = 0
) -> None:
  """Checks a text tokenizer; tables may have a few more rows than it has pieces."""
  formats.check_size(tokenizer, config, spare_rows)
  text_encoders.check_empty_text(config, tokenizer.encode('', 3)[0], tokenizer.path)


def _described_text_encoder(config, count: int) -> str:
  return (
    f'a text encoder of {count:,} parameters, {config.layers} layers of width {config.width}, '
    f'{config.text_length} text tokens'
  )


PART = formats.Part(
  {
    't5': formats.Format(
      _t5_config,
      lambda given, config: t5.key_map(config, given.arrays),
      lambda given: t5.IGNORED,
      flags=('vocabulary', 'config', 'text_length'),
      tokenizer=formats.Tokenizer(
        "its spiece.model or tokenizer.json; of t5x's checkpoints T5's sentencepiece.model",
        lambda path, given: formats.TokenizerFile(text_tokenizer.read_file(path)),
        functools.partial(_check_text_encoder_tokenizer, spare_rows=T5_SPARE_ROWS),
      ),
      config_file='config.json',
    ),
    'clip': formats.Format(
      lambda given: clip.text_config_of(given.arrays, given.config, given.flags['activation']),
      lambda given, config: clip.text_key_map(config, given.arrays),
      lambda given: clip.IGNORED_BY_TEXT,
      flags=('vocabulary', 'config', 'activation'),
      tokenizer=formats.Tokenizer(
        rankers.CLIP_TOKENIZER.files, rankers.CLIP_TOKENIZER.read, _check_text_encoder_tokenizer
      ),
      config_file='config.json',
    ),
  },
  _described_text_encoder,
  '--gin_file=models/imported_text_encoder.gin --gin.TEXT_ENCODER="\'{}\'" of `parti-jax train`',
)
