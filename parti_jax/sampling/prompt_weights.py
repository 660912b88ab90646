"""Weights of words in a prompt: '(hat:1.5)' counts more than plain 'hat', '(hat:0.5)' less.

A weight w moves the keys and values of a word's tokens, in the cross-attention to the text, away from
those of the empty text, or towards them: empty + w · (word − empty). Keys and values are linear in the
text encoder's features, unless `qk_norm` is on, so this scales the features around the empty text's.
The text encoder itself reads the prompt without weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32
from jaxtyping import Int32

from parti_jax.core import checks
from parti_jax.core.errors import UserError

MOST = 10.0
_PARTS = re.compile(
  r'\\(?P<escaped>[\\()])'
  r'|\((?P<words>(?:[^()\\]|\\.)*):\s*(?P<weight>[^():]*)\)'
  r'|(?P<wrong>[()])'
  r'|(?P<plain>[^()\\]+|\\)',
  re.DOTALL,
)

# Start and end in the plain text, and the weight.
_Span = tuple[int, int, float]


def parsed(prompt: str) -> tuple[str, list[_Span]]:
  r"""Splits a prompt with weights into plain text and the weights of its parts.

  Args:
    prompt: a text, with weights such as '(red hat:1.3)'. A backslash before a parenthesis or another
      backslash makes it plain text.

  Returns:
    The text without weights, and for each weighted part its start and end there and its weight.

  Raises:
    UserError: if a parenthesis is neither part of a weight nor escaped, or a weight isn't a number from
      0 to MOST.
  """
  text, spans = '', []
  for part in _PARTS.finditer(prompt):
    if part['wrong'] is not None:
      raise UserError(
        f'prompt {checks.shown(prompt)}: the {part["wrong"]!r} at character {part.start() + 1} belongs '
        r'to no weight such as (hat:1.3); write \( and \) for parentheses of the text'
      )
    if part['words'] is None:
      text += part['escaped'] or part['plain'] or ''
      continue
    try:
      weight = float(part['weight'])
    except ValueError:
      weight = float('nan')
    if not 0 <= weight <= MOST:
      raise UserError(
        f'prompt {checks.shown(prompt)}: the weight {checks.shown(part["weight"])} must be a number '
        f'from 0 to {MOST:g}'
      )
    words = re.sub(r'\\([\\()])', r'\1', part['words'])
    spans.append((len(text), len(text) + len(words), weight))
    text += words
  return text, spans


def plain(prompts: Sequence[str]) -> list[str]:
  """Returns prompts without their weights."""
  return [parsed(prompt)[0] for prompt in prompts]


def token_weights(
  tokenizer: Any, prompt: str, ids: Int32[np.ndarray, 'text_length']
) -> Float32[np.ndarray, 'text_length']:
  """Returns the weight of each text token of a prompt with weights.

  Args:
    tokenizer: the model's text tokenizer.
    prompt: the prompt.
    ids: the tokens of its plain text.

  Raises:
    UserError: as `parsed`; or if a weighted part isn't made of whole tokens.
  """
  text, spans = parsed(prompt)
  weights = np.ones(len(ids), np.float32)
  for start, end, weight in spans:
    first, last = (_tokens_before(tokenizer, text, at, ids, prompt) for at in (start, end))
    weights[first:last] = weight
  return weights


def check_supported(config: Any) -> None:
  """Checks that a generator attends to its text; raises UserError otherwise."""
  options = getattr(config, 'decoder_options', None)
  if not getattr(options, 'cross_attention', False):
    raise UserError(
      f"prompt_weights needs a decoder with cross-attention to the text, which {type(config).__name__}'s "
      'has not: its text is part of the sequence; leave the weights out'
    )


def _tokens_before(
  tokenizer: Any,
  text: str,
  at: int,
  ids: Int32[np.ndarray, 'text_length'],
  prompt: str,
) -> int:
  """Returns how many tokens of a text, special ones included, stand for its first characters."""
  last = int(np.flatnonzero(ids)[-1])  # The special token at the end.
  if not text[at:].strip():
    return last
  own, cut = tokenizer.encode(text[:at], len(ids))
  differs = np.flatnonzero(own != ids)
  count = int(differs[0]) if len(differs) else len(ids)
  # What is left of the beginning alone is the token at its end.
  if not cut and np.count_nonzero(own[count:]) > 1:
    raise UserError(
      f'prompt {checks.shown(prompt)}: a weight must take in whole words, since the text tokens go '
      f'across {checks.shown(text[max(0, at - 8) : at])} and what follows'
    )
  return min(count, last)
