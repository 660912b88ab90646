"""`TASK_FEATURE_LENGTHS` from a model's sizes, so that these are written once."""

from __future__ import annotations

from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan


def of_parti(config: parti_config.PartiConfig) -> dict[str, int]:
  """The lengths of the text tokens, 'inputs', and of the image tokens, 'targets'."""
  return {'inputs': config.text_length, 'targets': config.image_length}


def of_tokenizer(config: vit_vqgan.ViTVQGANConfig) -> dict[str, int]:
  """The side of the pictures in pixels, 'images'."""
  return {'images': config.image_size}
