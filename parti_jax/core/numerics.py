"""Fixes JAX's global settings, so that results don't depend on them.

Environment variables and `jax.config` can change dtypes, random draws, promotion and the precision
of products. `fixed` restores JAX's defaults for the code inside it. All code that computes for
users enters it: the methods of `Trainer`, `Placement` and `Detokenizer`, the tokenizing of caches,
plans, and `parti-jax train`.
"""

from __future__ import annotations

import contextlib

import jax

from parti_jax.core import errors

# The generator of all random draws.
_PRNG = 'threefry2x32'

# Context managers in `jax`, and the values that define our results.
_SETTINGS = {
  'enable_x64': False,
  'default_prng_impl': _PRNG,
  'threefry_partitionable': True,
  'numpy_dtype_promotion': 'standard',
  'numpy_rank_promotion': 'allow',
  'default_matmul_precision': None,
  'softmax_custom_jvp': False,
  'disable_jit': False,
  # These would raise where training continues: non-finite steps are skipped and reported.
  'debug_nans': False,
  'debug_infs': False,
  'debug_key_reuse': False,
  'transfer_guard': 'allow',
}


@contextlib.contextmanager
def fixed():
  """Applies the JAX settings that define our results; a context manager or decorator.

  The settings apply to the calling thread. A generator must leave the context before it yields;
  otherwise its caller would run inside it.

  Raises:
    UserError: if JAX adds an offset to all seeds; no context manager can undo that.
  """
  offset = getattr(jax.config, 'jax_random_seed_offset', 0)
  if offset:
    raise errors.UserError(
      f'JAX_RANDOM_SEED_OFFSET={offset} would change all random draws; unset it, or '
      'jax.config.jax_random_seed_offset'
    )
  with contextlib.ExitStack() as stack:
    for name, value in _SETTINGS.items():
      if hasattr(jax, name):  # Not all versions of JAX have all settings.
        stack.enter_context(getattr(jax, name)(value))
    yield


def key(seed) -> jax.Array:
  """Returns a seed's key, a key array [], independent of JAX's default generator."""
  return jax.random.key(seed, impl=_PRNG)
