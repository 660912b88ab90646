"""The steps that prepare one example, one function each.

Our own loop calls them through `Preparation`, and the seqio preprocessors call the same functions,
so a model sees the same examples either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import gin
import numpy as np
from jaxtyping import Float64
from jaxtyping import Int32
from jaxtyping import UInt8

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import image_decoding
from parti_jax.data import text_features as text_features_lib
from parti_jax.data import text_tokenizer

Decode = Callable[
  [bytes, image_sizes.ImageSize], tuple[UInt8[np.ndarray, 'height width 3'], list[str]]
]


# Of the features of a task: numbers of tokens, and the `image_sizes.ImageSize` of 'images'.
Lengths = Mapping[str, Any]


class Prepare(Protocol):
  """Prepares an example; `Preparation` describes the call."""

  @property
  def image_size(self) -> image_sizes.ImageSize | None:
    """Height and width of pictures in pixels, one number for squares; None without pictures."""

  def __call__(
    self, example: Mapping[str, Any], draw: float
  ) -> tuple[dict[str, Any], list[str]]: ...


def caption_ids(
  caption: bytes, vocabulary: text_tokenizer.TextTokenizer, length: int
) -> tuple[Int32[np.ndarray, 'text_length'], str, list[str]]:
  """Cleans and tokenizes a caption.

  Args:
    caption: raw bytes from a source.
    vocabulary: the text vocabulary.
    length: number of ids to return.

  Returns:
    The ids; the cleaned text; and a short note for each change or cut.

  Raises:
    captions.UnusableCaption: the caption can't be used.
  """
  text, changes = captions.clean(caption)
  ids, cut = vocabulary.encode(text, length)
  if vocabulary.is_empty(ids) and not cut:
    # The vocabulary drops all its characters; it would look like a text that guidance drops.
    raise captions.UnusableCaption('no caption')
  return ids, text, changes + ([cut_note(length)] if cut else [])


def cut_note(length: int) -> str:
  """Returns the note of `caption_ids` for a caption that does not fit."""
  return f'caption cut to {length} tokens'


def empty_text(
  vocabulary: text_tokenizer.TextTokenizer, length: int
) -> Int32[np.ndarray, 'text_length']:
  """Returns the ids of an empty text, which guidance uses for dropped texts."""
  return vocabulary.encode('', length)[0]


@gin.configurable('drop_text')
def drop_rate(rate: float = 0.1) -> float:
  """Returns the share of training examples whose text is dropped for classifier-free guidance.

  The paper drops 10% (section 3). `Preparation` drops the texts; under t5x it is
  `preprocessors.drop_text`.

  Args:
    rate: from 0 to 1.

  Raises:
    UserError: if the rate isn't a number from 0 to 1.
  """
  if type(rate) not in (int, float) or not 0 <= rate <= 1:
    raise UserError(f'drop_text.rate={rate!r} must be a number from 0 to 1')
  return rate


def draws(seed: int, position: int, count: int) -> Float64[np.ndarray, 'count']:
  """Returns the random numbers of successive examples, uniform in [0, 1).

  Args:
    seed: seed of the share.
    position: position of the first example.
    count: number of examples.
  """
  return np.random.Generator(np.random.PCG64(seed).advance(position)).random(count)


def stacked(found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Returns the features of several examples, each stacked; {} without examples."""
  if not found:
    return {}
  return {name: np.stack([features[name] for features in found]) for name in found[0]}


@dataclasses.dataclass(frozen=True)
class Preparation:
  """Converts an example to a model's inputs; picklable, for worker processes.

  Attributes:
    text_length: ids per caption; None without captions.
    image_size: height and width of pictures in pixels, one number for squares; None without pictures.
    image_tokens: tokens per picture; None without tokens.
    vocabulary: vocabulary of the captions; None without captions.
    decode: decodes pictures.
    drop_rate: share of the captions that are dropped.
    any_caption: whether any of several captions is used; otherwise the first.
    text_features: the examples' text features; None without them.
  """

  text_length: int | None = None
  image_size: image_sizes.ImageSize | None = None
  image_tokens: int | None = None
  vocabulary: text_tokenizer.TextTokenizer | None = None
  decode: Decode = image_decoding.decode_and_note
  drop_rate: float = 0.0
  any_caption: bool = False
  text_features: text_features_lib.TextFeatures | None = None

  def __call__(
    self, example: Mapping[str, Any], draw: float
  ) -> tuple[dict[str, np.ndarray], list[str]]:
    """Prepares an example.

    Args:
      example: an example of a source.
      draw: uniform in [0, 1); determines whether the text is dropped, the view, and which of
        several captions is used.

    Returns:
      The requested features among 'encoder_input_tokens' int32 [text_length], 'images' uint8
      [height, width, 3], 'decoder_target_tokens' int32 [image_tokens] and
      'decoder_loss_weights' float32 [image_tokens]; 'text_features' [text_length, width] with text
      features; and a short note for each change or cut.

    Raises:
      damage.Unusable: the example can't be used.
    """
    found: dict[str, np.ndarray] = {}
    notes: list[str] = []
    if self.text_length is not None:
      assert self.vocabulary is not None
      alternatives = captions.alternatives(example['caption'])
      number = captions.choice(len(alternatives), draw if self.any_caption else 0.0)
      caption = alternatives[number]
      ids, _, notes = caption_ids(caption, self.vocabulary, self.text_length)
      dropped = draw < self.drop_rate
      found['encoder_input_tokens'] = (
        empty_text(self.vocabulary, self.text_length) if dropped else ids
      )
      if self.text_features is not None:
        rows = None if dropped else example['text_features'][number]
        found['text_features'] = self.text_features.padded(rows)
    if self.image_size is not None:
      found['images'], more = self.decode(example['picture'], self.image_size)
      notes = notes + more
    if self.image_tokens is not None:
      tokens = example['tokens']
      if tokens.ndim == 2:  # Views; picked by digits that `drop_rate` hardly uses.
        tokens = tokens[int(draw * 2**40) % len(tokens)]
      found['decoder_target_tokens'] = tokens
      found['decoder_loss_weights'] = np.ones([self.image_tokens], np.float32)
    return found, notes
