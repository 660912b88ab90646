"""Losses of a discriminator and of what it judges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from parti_jax.models import discriminator as discriminator_lib
from parti_jax.training import optimizers


def resting_until(begins: int, optimizer=None):
  """A discriminator's optimiser that rests, state and all, until step `begins`.

  Args:
    begins: the first step that it takes.
    optimizer: an optax transformation; None for Adam with a learning rate of 1e-4.
  """
  optimizer = optimizer or optimizers.adamw(1e-4, beta1=0.0, weight_decay=0.0)
  return optax.conditionally_mask(optimizer, lambda step: step >= begins)


def other_optimizers(objective):
  """The discriminator's optimiser, which rests until there is something to train.

  Args:
    objective: with the attributes `adversarial_weight`, `adversarial_from` and
      `discriminator_optimizer`.

  Returns:
    As `Objective.other_optimizers`.
  """
  if not objective.adversarial_weight:
    return {}
  return {
    'discriminator': resting_until(objective.adversarial_from, objective.discriminator_optimizer)
  }


def over_examples(config: discriminator_lib.DiscriminatorConfig) -> tuple[str, ...]:
  """What these losses compute over several examples, see `Objective`."""
  return ('minibatch standard deviation in the discriminator',) * (config.minibatch_group > 1)


def losses(config: discriminator_lib.DiscriminatorConfig, params, images, drawn):
  """The non-saturating logistic losses of both sides (arXiv 1406.2661; StyleGAN2, appendix B).

  Each side's gradient reaches its own parameters alone, so that one backward pass of their sum is
  a step of both.

  Args:
    config: sizes of the discriminator.
    params: its parameters.
    images: float32 [batch, size, size, 3], real pictures in [0, 1].
    drawn: likewise, what is to be taken for real.

  Returns:
    float32 []: the loss of what has drawn, mean softplus(−D(drawn)).
    float32 []: the loss of the discriminator, mean softplus(D(drawn)) + softplus(−D(images)).
    Scalars to show: mean logits of both kinds.
  """
  judge = lambda params, images: discriminator_lib.Discriminator(config).apply(
    {'params': params}, images
  )
  stop = jax.lax.stop_gradient
  real, of_drawn = judge(params, images), judge(params, stop(drawn))
  discriminator = jnp.mean(jax.nn.softplus(of_drawn)) + jnp.mean(jax.nn.softplus(-real))
  generator = jnp.mean(jax.nn.softplus(-judge(stop(params), drawn)))
  return (
    generator,
    discriminator,
    {'logits_real': jnp.mean(real), 'logits_drawn': jnp.mean(of_drawn)},
  )


def r1_penalty(config: discriminator_lib.DiscriminatorConfig, params, images):
  """R1: the mean over real pictures of ‖∇D‖² by their pixels (arXiv 1801.04406, equation 9).

  Args:
    config: sizes of the discriminator.
    params: its parameters.
    images: float32 [batch, size, size, 3] in [0, 1].

  Returns:
    float32 [].
  """
  module = discriminator_lib.Discriminator(config)
  gradients = jax.grad(lambda images: jnp.sum(module.apply({'params': params}, images)))(images)
  return jnp.mean(jnp.sum(jnp.square(gradients), axis=(1, 2, 3)))


def adaptive_weight(hidden, rest, adversarial):
  """VQGAN's weight of the adversarial loss (arXiv 2012.09841, equations 6 and 7).

  The ratio of gradient norms at the last layer's kernel. That layer is linear, so its gradient is
  the product of its input and of the gradient of its output.

  Args:
    hidden: [batch, length, width], the layer's input.
    rest: [batch, length, outputs], gradient of the other losses by the layer's output.
    adversarial: likewise, of the adversarial loss.

  Returns:
    float32 [] in [0, 10,000], without gradient: ‖∇rest‖ / (‖∇adversarial‖ + 1e-6).
  """

  def norm(gradients):
    product = jnp.einsum('bli,blo->io', hidden.astype(jnp.float32), gradients.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(product)))

  ratio = norm(rest) / (norm(adversarial) + 1e-6)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))
