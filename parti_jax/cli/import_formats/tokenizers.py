"""Formats of image tokenizers."""

from __future__ import annotations

from parti_jax.cli.import_formats import formats
from parti_jax.importers import enhancing_vit_vqgan
from parti_jax.importers import vqgan


def _vqgan_config(given: formats.Given):
  size, pixel_range = given.flags['image_size'], given.flags['pixel_range']
  return vqgan.config_of(
    given.arrays,
    given.file_format,
    256 if size is None else size,
    None if pixel_range is None else tuple(pixel_range),
  )


def _described_tokenizer(config, count: int) -> str:
  rows, columns = config.grid
  return (
    f'an image tokenizer of {count:,} parameters, {config.codebook_size:,} codes, '
    f'{rows}×{columns} tokens for images of {config.image_size}×{config.image_size} pixels'
  )


PART = formats.Part(
  {
    name: formats.Format(
      _vqgan_config,
      lambda given, config: vqgan.key_map(config, given.arrays, given.file_format),
      lambda given: vqgan.ignored(given.arrays, given.file_format),
      flags=('image_size', 'pixel_range'),
    )
    for name in vqgan.FORMATS
  }
  | {
    enhancing_vit_vqgan.FORMAT: formats.Format(
      lambda given: enhancing_vit_vqgan.config_of(given.arrays),
      lambda given, config: enhancing_vit_vqgan.key_map(config, given.arrays),
      lambda given: enhancing_vit_vqgan.ignored(given.arrays),
    )
  },
  _described_tokenizer,
  '--tokenizer={} of `parti-jax tokenize` and `parti-jax export`',
)
