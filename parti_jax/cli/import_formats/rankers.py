"""Formats of rankers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from parti_jax.cli.import_formats import formats
from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer
from parti_jax.data import vocabulary
from parti_jax.exported_model import preprocessing
from parti_jax.importers import clip
from parti_jax.importers import siglip
from parti_jax.importers import tokenizer_files
from parti_jax.sampling import ranking

# Id of the unknown piece in Gemma's SentencePiece model; in other models it is 2.
_GEMMA_UNKNOWN = 3


def _clip_config(given: formats.Given, layout: str, activation: str | None = None):
  found = clip.layout(given.arrays)
  if found != layout:
    hint = '; give --format=open_clip' if found == 'open_clip' else '; give --format=clip'
    raise UserError(f'the weights have the names of {found}, not those of {layout}{hint}')
  activation = activation or given.flags['activation']
  return clip.config_of(given.arrays, given.config, given.preprocessor, activation)


def _clip_preprocessing(given: formats.Given, config) -> preprocessing.Preprocessing:
  return clip.preprocessing_of(given.arrays, config, given.config, given.preprocessor)


def _siglip_tokenizer(path: str, given: formats.Given) -> formats.TokenizerFile:
  """Reads Gemma's tokenizer.json, its folder, or Gemma's SentencePiece model."""
  del given
  if os.path.isdir(path) or text_tokenizer.read_file(path).lstrip()[:1] == b'{':
    return formats.TokenizerFile(tokenizer_files.of_siglip_2(path))
  found = vocabulary.TextVocabulary(path)
  if found.unknown_id != _GEMMA_UNKNOWN:
    raise UserError(
      f"{path} isn't Gemma's SentencePiece model, which SigLIP 2 uses: its unknown piece has the "
      f'id {found.unknown_id} instead of {_GEMMA_UNKNOWN}. SigLIP of 2023 has another vocabulary '
      'and is not read'
    )
  return formats.TokenizerFile(text_tokenizer.read_file(path), lower_case=True)


def _check_ranker_tokenizer(tokenizer: text_tokenizer.TextTokenizer, config) -> None:
  if tokenizer.size < config.text_vocabulary:
    raise formats.of_another_network(tokenizer, config)
  ranking.check_tokenizer(tokenizer, config)


def _described_ranker(config, count: int) -> str:
  return (
    f'a ranker of {count:,} parameters, vectors of {config.feature_dim}, images of '
    f'{config.image_size}×{config.image_size} pixels, {config.text_length} text tokens'
  )


CLIP_TOKENIZER = formats.Tokenizer(
  "OpenAI CLIP's tokenizer.json, or a folder with its vocab.json and merges.txt",
  lambda path, given: formats.TokenizerFile(tokenizer_files.of_clip(path)),
  _check_ranker_tokenizer,
)


def _clip_format(config_of: Callable[[formats.Given], Any], **others: Any) -> formats.Format:
  settings: dict[str, Any] = {
    'flags': ('vocabulary', 'config', 'activation'),
    'preprocessing': _clip_preprocessing,
  } | others
  return formats.Format(
    config_of,
    lambda given, config: clip.key_map(config, given.arrays),
    lambda given: clip.IGNORED,
    tokenizer=CLIP_TOKENIZER,
    **settings,
  )


PART = formats.Part(
  {
    'clip': _clip_format(
      functools.partial(_clip_config, layout='transformers'),
      flags=('vocabulary', 'config', 'preprocessor', 'activation'),
      config_file='config.json',
    ),
    'open_clip': _clip_format(
      functools.partial(_clip_config, layout='open_clip'), config_file='open_clip_config.json'
    ),
    'hpsv2': _clip_format(
      functools.partial(_clip_config, layout='open_clip', activation='gelu'),
      flags=('vocabulary',),
      preprocessing=lambda *_: preprocessing.Preprocessing(fit='pad'),
    ),
    'siglip2': formats.Format(
      lambda given: siglip.config_of(given.arrays, given.config, given.preprocessor),
      lambda given, config: siglip.key_map(config, given.arrays),
      lambda given: siglip.IGNORED,
      flags=('vocabulary', 'config', 'preprocessor'),
      tokenizer=formats.Tokenizer(
        "SigLIP 2's tokenizer.json, or Gemma's tokenizer.model",
        _siglip_tokenizer,
        _check_ranker_tokenizer,
      ),
      preprocessing=lambda given, config: siglip.preprocessing_of(given.preprocessor, config),
      config_file='config.json',
    ),
  },
  _described_ranker,
  '--ranker={} of `parti-jax generate`, `prompts`, `evaluate` and `export`',
)
