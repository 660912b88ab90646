"""What is asked of sampling: which pictures, and what they follow."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int32

from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import decoding
from parti_jax.sampling import editing


@dataclasses.dataclass(frozen=True)
class Request:
  """Pictures to sample: checked arguments of `TextToImage.generate`.

  Attributes:
    prompts: the prompts.
    seed: the seed.
    settings: the sampling settings.
    best_of: number of candidates of each picture.
    index: the index of each picture; with `best_of` of each candidate.
    texts: text tokens of the prompts.
    sampling: the settings in the decoding loop's form.
    negative: the text of guidance's other side; None for the empty text.
    weighted: whether the prompts have weights of words.
    edit: the edit; None for none.
    prefix: an argument of `decoding.begin`.
    edited_tokens: the edited picture's tokens; None if none are kept.
    kept: which tokens each picture keeps; None without an edit.
    others: text tokens of guidance's other side; None for the empty text.
    text_weights: weight of each text token; None for 1.
  """

  prompts: list[str]
  seed: int
  settings: sampling_settings.SamplingSettings
  best_of: int
  index: Int32[np.ndarray, 'prompts candidates']
  texts: Int32[np.ndarray, 'prompts text_length']
  sampling: decoding.Sampling
  negative: str | None
  weighted: bool
  edit: editing.Edit | None
  prefix: int
  edited_tokens: Int32[np.ndarray, 'image_length'] | None
  kept: Bool[np.ndarray, 'prompts candidates image_length'] | None
  others: Int32[np.ndarray, 'text_length'] | None
  text_weights: Float32[np.ndarray, 'prompts text_length'] | None

  @property
  def steered(self) -> bool:
    """Whether pictures follow more than their prompts."""
    given = (self.edited_tokens, self.others, self.text_weights)
    return any(part is not None for part in given)

  def rows(self, pictures: np.ndarray) -> np.ndarray:
    """Returns the number of the prompt of each picture, given the numbers of pictures."""
    return pictures // self.index.shape[1]

  def steering(self, pictures: np.ndarray) -> decoding.Steering:
    """Returns what pictures follow besides their prompts."""

    def repeated(row):
      return None if row is None else np.broadcast_to(row, (len(pictures), len(row)))

    kept = None
    if self.edited_tokens is not None and self.kept is not None:
      kept = self.kept.reshape(self.index.size, -1)[pictures]
    return decoding.Steering(
      others=repeated(self.others),
      text_weights=None if self.text_weights is None else self.text_weights[self.rows(pictures)],
      tokens=repeated(self.edited_tokens),
      kept=kept,
    )
