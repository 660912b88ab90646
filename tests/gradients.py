"""Gradients of attention, for comparing its forms."""

import jax
import jax.numpy as jnp


def with_gradients(attend, *inputs):
  """Returns the result, and gradients of a sum over it that differs from place to place."""

  def loss(*inputs):
    out = attend(*inputs)
    places = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(out.astype(jnp.float32) * places), out

  differentiate = jax.jit(jax.grad(loss, argnums=tuple(range(len(inputs))), has_aux=True))
  gradients, out = differentiate(*inputs)
  return (out, *gradients)
