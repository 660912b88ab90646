"""Prompts to text tokens, and to weights of their words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from jaxtyping import Int32

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import sampling_settings
from parti_jax.models import generators
from parti_jax.sampling import prompt_weights as prompt_weights_lib


class PromptEncoder:
  """Encodes prompts for a generator.

  Attributes:
    vocabulary: the text tokenizer.
  """

  def __init__(self, path, config: generators.Config, cache: str):
    """Opens the text tokenizer.

    Args:
      path: its file.
      config: sizes of the generator.
      cache: how sampling holds keys and values, a name in `sampling_settings.CACHES`.

    Raises:
      UserError: if the file can't be read, or belongs to another generator.
    """
    self._config = config
    self._cache = cache
    self.vocabulary = text_tokenizer.open_tokenizer(path)
    if self.vocabulary.size > config.text_vocabulary:
      raise UserError(
        f'{path} has {self.vocabulary.size} pieces, but the model knows '
        f'{config.text_vocabulary}; it belongs to another model'
      )
    empty = self.vocabulary.encode('', max(config.text_length, 3))[0]
    generators.check_empty_text(config, empty, str(path))

  def encode(
    self, prompts: Sequence[str], stacklevel: int, name: str = 'prompt'
  ) -> Int32[np.ndarray, 'prompts text_length']:
    """Encodes texts to text tokens, cut to the text length with a warning.

    Args:
      prompts: the texts.
      stacklevel: number of calls up to the caller's code, to which warnings point.
      name: what the texts are, for messages.

    Raises:
      UserError: if there is no text, or one is blank.
    """
    if not prompts:
      raise UserError('no prompt given')
    texts = np.empty([len(prompts), self._config.text_length], np.int32)
    for row, prompt in enumerate(prompts):
      texts[row], cut = self.vocabulary.encode(prompt, self._config.text_length)
      if self.vocabulary.is_empty(texts[row]):
        raise UserError(f'{name} {row + 1} is empty; say what the picture should show')
      if cut:
        warnings.warn(
          f'{name} {row + 1} is longer than the {self._config.text_length} text tokens of the '
          f'model; left out: {cut!r}',
          stacklevel=stacklevel,
        )
    return texts

  def encode_weighted(
    self, prompts: list[str], weighted: bool, stacklevel: int
  ) -> tuple[
    Int32[np.ndarray, 'prompts text_length'], Float32[np.ndarray, 'prompts text_length'] | None
  ]:
    """Returns the text tokens of prompts, and their weights if the prompts have any.

    Args:
      prompts: the prompts.
      weighted: whether they have weights of words.
      stacklevel: an argument of `encode`.

    Raises:
      UserError: as `encode` does, or if the decoder or its cache can't weight words.
    """
    if not weighted:
      return self.encode(prompts, stacklevel), None
    prompt_weights_lib.check_supported(self._config)
    if self._cache == 'int8':
      raise UserError(
        "prompt_weights change keys and values of the text, which cache='int8' rounds; load the model "
        "with cache='float'"
      )
    texts = self.encode(prompt_weights_lib.plain(prompts), stacklevel)
    weights = np.stack(
      [
        prompt_weights_lib.token_weights(self.vocabulary, prompt, ids)
        for prompt, ids in zip(prompts, texts)
      ]
    )
    return texts, None if np.all(weights == 1) else weights

  def encode_negative(
    self, negative, settings: sampling_settings.SamplingSettings
  ) -> Int32[np.ndarray, 'text_length']:
    """Encodes the text of guidance's other side to text tokens.

    Args:
      negative: an argument of `generate`.
      settings: the settings with which to sample.

    Raises:
      UserError: if there is no guidance, or the text is blank.
    """
    negative = checks.texts('negative', checks.text('negative', negative))[0]
    if not settings.guided:
      raise UserError(
        'negative is the other side of guidance, which guidance_scale=1 turns off; choose a larger '
        'guidance_scale, such as 2'
      )
    if not negative.strip():
      raise UserError('negative is empty; without it, guidance has the empty text there')
    return self.encode([negative], 5, 'negative text')[0]

  def left_out(self, prompt: str) -> str:
    """Returns the end of a prompt that `encode` leaves out; empty if all of it fits."""
    return self.vocabulary.encode(prompt, self._config.text_length)[1]
