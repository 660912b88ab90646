"""Computes t5x's `TASK_FEATURE_LENGTHS` from the sizes of a model."""

from __future__ import annotations

from parti_jax.core import image_sizes
from parti_jax.models import image_tokenizers
from parti_jax.models import parti_config


def of_parti(config: parti_config.PartiConfig) -> dict[str, int]:
  """Returns the numbers of text tokens, 'inputs', and of image tokens, 'targets'."""
  return {'inputs': config.text_length, 'targets': config.image_length}


def of_tokenizer(config: image_tokenizers.Config) -> dict[str, int]:
  """Returns the height and width of the pictures in pixels, 'images'.

  Raises:
    UserError: if the pictures aren't square, which only `parti-jax train` supports.
  """
  return {'images': image_sizes.square(config.image_size, 't5x trains on', 'use parti-jax train')}
