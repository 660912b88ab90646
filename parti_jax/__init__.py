"""Parti, autoregressive text-to-image generation (arXiv 2206.10789), in JAX and Flax."""

__version__ = '0.1.0'
__all__ = ['load']


def __getattr__(name):
  # `parti_jax.load` imports JAX only when it is used, so that importing any module of the
  # package (and asking the command line for help) stays quick.
  if name == 'load':
    from parti_jax.sampling import text_to_image

    return text_to_image.load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *__all__})
