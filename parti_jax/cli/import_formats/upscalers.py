"""Formats of super-resolution networks."""

from __future__ import annotations

from parti_jax.cli.import_formats import formats
from parti_jax.importers import real_esrgan


def _described_upscaler(config, count: int) -> str:
  return (
    f'a super-resolution network of {count:,} parameters, which enlarges pictures by '
    f'{config.factor}'
  )


PART = formats.Part(
  {
    real_esrgan.FORMAT: formats.Format(
      lambda given: real_esrgan.config_of(given.arrays),
      lambda given, config: real_esrgan.key_map(config, given.arrays),
      lambda given: real_esrgan.ignored(given.arrays),
      flags=('interpolate_with', 'denoise_strength'),
    )
  },
  _described_upscaler,
  '--upscaler={0} of `parti-jax generate` and `evaluate_upscaling`, and --super_resolution={0} of '
  '`export`',
)
