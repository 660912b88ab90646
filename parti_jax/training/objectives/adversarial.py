"""Losses of a discriminator and of the network that it judges."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import Float

from parti_jax.models import discriminator as discriminator_lib
from parti_jax.training import optimizers


def resting_until(
  begins: int, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
  """Returns a discriminator's optimizer that skips all steps before `begins`.

  Args:
    begins: its first step. Before it, the optimizer's state doesn't change either.
    optimizer: an optax transformation; None for Adam with a learning rate of 1e-4.
  """
  optimizer = optimizer or optimizers.adamw(1e-4, beta1=0.0, weight_decay=0.0)
  return optax.conditionally_mask(optimizer, lambda step: step >= begins)


def other_optimizers(
  weight: float, begins: int, optimizer: optax.GradientTransformation | None
) -> dict[str, optax.GradientTransformation]:
  """Returns the `Objective.other_optimizers` of an objective with a discriminator.

  Args:
    weight: weight of the adversarial loss; 0 if there is no discriminator.
    begins: the first step with an adversarial loss.
    optimizer: the discriminator's optimizer; None for the default of `resting_until`.
  """
  return {'discriminator': resting_until(begins, optimizer)} if weight else {}


def batch_dependent_terms(config: discriminator_lib.DiscriminatorConfig) -> tuple[str, ...]:
  """Returns the `Objective.batch_dependent_terms` of these losses."""
  if config.minibatch_group > 1:
    return ('minibatch standard deviation in the discriminator',)
  return ()


def losses(
  config: discriminator_lib.DiscriminatorConfig,
  params: Mapping[str, Any],
  images: Float[Array, 'batch height width 3'],
  drawn: Float[Array, 'batch height width 3'],
) -> tuple[Float[Array, ''], Float[Array, ''], dict[str, Float[Array, '']]]:
  """The non-saturating logistic losses of both networks (arXiv 1406.2661; StyleGAN2, appendix B).

  Each loss only has gradients for its own network, so one backward pass of their sum trains both.

  Args:
    config: the discriminator's config.
    params: the discriminator's parameters.
    images: real images in [0, 1].
    drawn: the generator's images.

  Returns:
    generator_loss: mean softplus(−D(drawn)).
    discriminator_loss: mean softplus(D(drawn)) + softplus(−D(images)).
    metrics: the mean logits of real and of generated images.
  """
  logits: Callable[..., Any] = discriminator_lib.Discriminator(config).apply
  stop = jax.lax.stop_gradient
  real, of_drawn = logits({'params': params}, images), logits({'params': params}, stop(drawn))
  discriminator = jnp.mean(jax.nn.softplus(of_drawn)) + jnp.mean(jax.nn.softplus(-real))
  generator = jnp.mean(jax.nn.softplus(-logits({'params': stop(params)}, drawn)))
  return (
    generator,
    discriminator,
    {'logits_real': jnp.mean(real), 'logits_drawn': jnp.mean(of_drawn)},
  )


def r1_penalty(
  config: discriminator_lib.DiscriminatorConfig,
  params: Mapping[str, Any],
  images: Float[Array, 'batch height width 3'],
) -> Float[Array, '']:
  """R1: the mean of ‖∇D‖² with respect to real images (arXiv 1801.04406, equation 9).

  Args:
    config: the discriminator's config.
    params: the discriminator's parameters.
    images: real images in [0, 1].
  """
  logits: Callable[..., Any] = discriminator_lib.Discriminator(config).apply
  gradients = jax.grad(lambda images: jnp.sum(logits({'params': params}, images)))(images)
  return jnp.mean(jnp.sum(jnp.square(gradients), axis=(1, 2, 3)))


def adaptive_weight(
  rest: Float[Array, '*kernel'], adversarial: Float[Array, '*kernel']
) -> Float[Array, '']:
  """VQGAN's weight of the adversarial loss (arXiv 2012.09841, equations 6 and 7).

  Args:
    rest: gradient of the other losses with respect to the kernel of the decoder's last layer.
    adversarial: gradient of the adversarial loss with respect to it.

  Returns:
    ‖∇rest‖ / (‖∇adversarial‖ + 1e-6), float32 in [0, 10,000], without gradient.
  """
  norm = lambda gradient: jnp.sqrt(jnp.sum(jnp.square(gradient)))
  ratio = norm(rest) / (norm(adversarial) + 1e-6)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))
