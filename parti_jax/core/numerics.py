"""JAX's settings of the process, which the results of this package do not depend on.

JAX lets environment variables and `jax.config` change dtypes, random draws, promotion and the
precision of products. `fixed` sets JAX's defaults for what is computed inside it. Whatever computes
for users enters it: the methods of `Trainer`, `Placement` and `Detokenizer`, the tokenizing of
caches, plans, and `parti-jax train`.
"""

from __future__ import annotations

import contextlib

import jax

from parti_jax.core import errors

# The generator of all random draws.
_PRNG = 'threefry2x32'

# Context managers of the module `jax`, and the values that results are defined by.
_SETTINGS = {
  'enable_x64': False,
  'default_prng_impl': _PRNG,
  'threefry_partitionable': True,
  'numpy_dtype_promotion': 'standard',
  'numpy_rank_promotion': 'allow',
  'default_matmul_precision': None,
  'softmax_custom_jvp': False,
  'disable_jit': False,
  # These raise where a run would go on: steps that are not finite are skipped and reported.
  'debug_nans': False,
  'debug_infs': False,
  'debug_key_reuse': False,
  'transfer_guard': 'allow',
}


@contextlib.contextmanager
def fixed():
  """A context, or a decorator of functions, with JAX's settings as results are defined by.

  The settings are those of the calling thread. A generator must leave the context before it
  yields, since its caller would go on inside it.

  Raises:
    UserError: if JAX adds an offset to all seeds, for which it has no such context.
  """
  offset = getattr(jax.config, 'jax_random_seed_offset', 0)
  if offset:
    raise errors.UserError(
      f'JAX_RANDOM_SEED_OFFSET={offset} would change all random draws; unset it, or '
      'jax.config.jax_random_seed_offset'
    )
  with contextlib.ExitStack() as stack:
    for name, value in _SETTINGS.items():
      if hasattr(jax, name):  # What a version of JAX has no setting for can't be changed.
        stack.enter_context(getattr(jax, name)(value))
    yield


def key(seed) -> jax.Array:
  """The key of a seed, whatever generator is JAX's default: a key array []."""
  return jax.random.key(seed, impl=_PRNG)
