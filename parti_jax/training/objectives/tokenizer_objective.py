"""Training the image tokenizer (ViT-VQGAN, section 3; Parti, section 2.1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.models import config_checks
from parti_jax.models import discriminator as discriminator_lib
from parti_jax.models import flops
from parti_jax.models import lpips
from parti_jax.models import quantizer
from parti_jax.models import vit_vqgan
from parti_jax.training import state as state_lib
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import lpips_weights

# What the tokenizer's parameters are made of; a discriminator is trained beside them.
PARTS = ('encoder', 'quantizer', 'decoder')
# What a step costs in forward passes of one picture. Of VGG16: both pictures forward, what was
# drawn backward to its pixels. Of the discriminator: both forward and backward, what was drawn to
# its pixels too.
PERCEPTUAL_PASSES = 3
ADVERSARIAL_PASSES = 7


def logit_laplace_loss(images, mean, log_scale, least_log_scale: float = -7.0):
  """Negative log likelihood of pixels under a logit-laplace distribution.

  Args:
    images: float32 [batch, height, width, 3] in [0, 1].
    mean: of the logits, as `images`.
    log_scale: logarithm of the distribution's scale b, as `images`.
    least_log_scale: smaller ones count as this.

  Returns:
    float32 [batch], the mean over pixels of |logit(x) − μ| / b + log(2·b·x·(1 − x)), with x
    squeezed into [ε, 1 − ε] (DALL-E, arXiv 2102.12092, appendix A.3).
  """
  epsilon = vit_vqgan.LOGIT_LAPLACE_EPSILON
  x = (1.0 - 2.0 * epsilon) * images + epsilon
  log_scale = jnp.maximum(log_scale, least_log_scale)
  loss = (
    jnp.abs(jnp.log(x) - jnp.log1p(-x) - mean) * jnp.exp(-log_scale)
    + jnp.log(2.0 * x * (1.0 - x))
    + log_scale
  )
  return jnp.mean(loss, axis=(1, 2, 3))


def psnr(images, reconstructions):
  """Peak signal-to-noise ratio in dB of pictures in [0, 1]: [batch, ...] to float32 [batch]."""
  error = jnp.mean(jnp.square(images - reconstructions), axis=(1, 2, 3))
  return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


def revive(table, use, dead, latents, rng):
  """Sets dead codes to latents that have no code near them.

  The latents are drawn with a chance that grows with their distance to their code, as k-means++
  draws its centres; drawn evenly, most would be of the blank patches that have codes enough.

  Args:
    table: float32 [codes, code_dim], the codebook.
    use: float32 [codes], use of each code per batch.
    dead: bool [codes].
    latents: [batch, length, code_dim].
    rng: a key.

  Returns:
    The codebook, and the use with a start of 0.1 for each code that was set.
  """
  latents = quantizer.normalize(latents.reshape(-1, table.shape[1]))
  nearest = jnp.max(latents @ quantizer.normalize(table).T, axis=-1)
  chance = jnp.log(jnp.maximum(1.0 - nearest, 1e-6)) + jax.random.gumbel(
    rng, nearest.shape, jnp.float32, mode='low'
  )
  count = min(table.shape[0], latents.shape[0])
  chosen = latents[jax.lax.top_k(chance, count)[1]]
  turn = jnp.cumsum(dead) - 1
  revived = dead & (turn < count)
  table = jnp.where(revived[:, None], chosen[jnp.clip(turn, 0, count - 1)], table)
  return table, jnp.where(revived, 0.1, use)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class TokenizerObjective(base.Objective):
  """The image tokenizer's losses, its code statistics and its pictures.

  Attributes:
    model: sizes of the tokenizer.
    l2_weight: of the mean squared error (1.0 in ViT-VQGAN).
    coarse_l2_weight: of the mean squared error between pictures whose squares of 4×4 pixels are
      averaged; not in the papers, it keeps flat colours true where outlines take most of the l2.
    logit_laplace_weight: of the logit-laplace loss (0.1 in ViT-VQGAN).
    least_log_scale: floor of the logit-laplace distribution's log scale. Where pictures are flat
      areas of one colour, a low one spends the gradient on the areas' last digits.
    quantizer_weight: of the quantizer's loss.
    perceptual_weight: of LPIPS (0.1 in ViT-VQGAN); 0 for none, which needs no files.
    vgg16_weights: file of VGG16's weights for LPIPS, see `lpips_weights.read`.
    lpips_weights: file of LPIPS' linear heads.
    adversarial_weight: of the adversarial loss (0.1 in ViT-VQGAN); 0 for no discriminator.
    adversarial_adaptive: whether that weight is multiplied by VQGAN's ratio of gradient norms, see
      `adversarial.adaptive_weight`; with microbatches the ratio is one microbatch's.
    adversarial_from: until this step there is neither the adversarial loss nor its discriminator's.
    discriminator: sizes of the discriminator.
    discriminator_optimizer: an optax transformation; None for Adam with a learning rate of 1e-4.
    r1_weight: γ of the discriminator's penalty γ/2 · R1 (10 in StyleGAN2).
    r1_every: steps between penalties, each of which counts as many times (StyleGAN2, section 3.1).
    ema: decay of the average of weights that is evaluated, drawn with and exported (0.999 in
      ViT-VQGAN); 0 for no average. See `state.update_average`.
    quantize_from: until this step the decoder sees the latents themselves, so that there is
      something to quantize when the first codes are taken from them.
    revive_every: steps between revivals of dead codes, see `revive`; 0 for never.
    revive_until: no revival from this step on, so that the codes settle.
    dead_below: a code is dead if its use per batch, averaged over about 50 steps, is below.
    frozen: parts of the tokenizer that stay as they are; ('encoder', 'quantizer') is the second
      phase, in which the decoder learns to draw the same tokens better (Parti, section 2.1).
    first_phase: run of a tokenizer (its --model_dir) from whose parameters a new run starts: its
      encoder and codebook, and its decoder where this one has the same sizes. A larger decoder
      starts at random (Parti, section 2.1).
  """

  model: vit_vqgan.ViTVQGANConfig
  l2_weight: float = 1.0
  coarse_l2_weight: float = 0.0
  logit_laplace_weight: float = 0.1
  least_log_scale: float = -7.0
  quantizer_weight: float = 1.0
  perceptual_weight: float = 0.0
  vgg16_weights: str | None = None
  lpips_weights: str | None = None
  adversarial_weight: float = 0.0
  adversarial_adaptive: bool = False
  adversarial_from: int = 0
  discriminator: discriminator_lib.DiscriminatorConfig = discriminator_lib.DiscriminatorConfig()
  discriminator_optimizer: Any = None
  r1_weight: float = 10.0
  r1_every: int = 16
  ema: float = 0.0
  quantize_from: int = 0
  revive_every: int = 0
  revive_until: int = 0
  dead_below: float = 0.02
  frozen: tuple[str, ...] = ()
  first_phase: str | None = None

  def __post_init__(self):
    not_negative = dict.fromkeys(
      (
        'l2_weight',
        'coarse_l2_weight',
        'logit_laplace_weight',
        'quantizer_weight',
        'perceptual_weight',
        'adversarial_weight',
        'adversarial_from',
        'r1_weight',
        'quantize_from',
        'revive_every',
        'revive_until',
        'dead_below',
      ),
      (0, None),
    )
    config_checks.check_fields(self, **not_negative)
    unknown = set(self.frozen) - set(PARTS)
    if unknown:
      raise errors.UserError(
        f'TokenizerObjective.frozen: {sorted(unknown)} are no parts; there are '
        'encoder, quantizer and decoder'
      )
    if self.adversarial_weight:
      self.discriminator.sizes(self.model.image_size)
    if self.r1_every < 1:
      raise errors.UserError(f'TokenizerObjective.r1_every={self.r1_every} must be at least 1')
    if not 0 <= self.ema < 1:
      raise errors.UserError(f'TokenizerObjective.ema={self.ema} must be at least 0 and below 1')
    if self.perceptual_weight and self.model.image_size < lpips.LEAST_SIZE:
      raise errors.UserError(
        f'TokenizerObjective.perceptual_weight: LPIPS needs pictures of {lpips.LEAST_SIZE} pixels; '
        f'set it to 0 with ViTVQGANConfig.image_size={self.model.image_size}'
      )

  name = 'tokenizer'

  @property
  def over_examples(self) -> tuple[str, ...]:
    """What the losses compute over several examples, see `Objective`."""
    if not self.adversarial_weight:
      return ()
    weight = ('adaptive weight of the adversarial loss',) if self.adversarial_adaptive else ()
    return (*adversarial.over_examples(self.discriminator), *weight)

  def feature_lengths(self) -> dict[str, int]:
    return {'images': self.model.image_size}

  def abstract_batch(self, batch_size: int):
    """Shapes and dtypes of a batch, as `loss` takes it."""
    shape = (batch_size, self.model.image_size, self.model.image_size, 3)
    return {'images': jax.ShapeDtypeStruct(shape, jnp.uint8)}

  def init(self, rng):
    """Parameters with their logical axis names: PARTS, and the discriminator where there is one."""
    module = vit_vqgan.ViTVQGAN(self.model)
    images = vit_vqgan.example_inputs(self.model)
    params = module.init(rng, *images)['params']
    if self.adversarial_weight:
      judge = discriminator_lib.Discriminator(self.discriminator)
      rng = jax.random.fold_in(rng, 1)
      params = params | {'discriminator': judge.init(rng, *images)['params']}
    return params

  def initial_parts(self, abstract_params, inputs):
    """What a new run takes from `first_phase`: {name of a part: its parameters on the mesh}.

    Raises:
      UserError: if there is no finished checkpoint, or its encoder or codebook has other sizes.
    """
    del inputs  # Pictures have no ids.
    if self.first_phase is None:
      return {}
    first = frozen_tokenizer.load(self.first_phase)
    theirs, ours = dataclasses.asdict(first.config), dataclasses.asdict(self.model)
    of_decoder = [name for name in ours if name.startswith('decoder_')]
    taken = PARTS
    if any(theirs[name] != ours[name] for name in of_decoder):
      taken = ('encoder', 'quantizer')
    wanted = {
      'stage': self.name,
      'config': {name: value for name, value in ours.items() if name not in of_decoder},
    }
    run_checkpoints.check_same_model(
      f'TokenizerObjective.first_phase={self.first_phase}',
      {'stage': self.name, 'config': theirs},
      wanted,
    )
    return run_checkpoints.put_like(
      {name: first.params[name] for name in taken}, {name: abstract_params[name] for name in taken}
    )

  def other_optimizers(self):
    return adversarial.other_optimizers(self)

  def constants(self):
    """LPIPS' parameters, as 'perceptual'.

    Raises:
      UserError: if a file of weights is not given, is missing or damaged.
    """
    if not self.perceptual_weight:
      return {}
    return {'perceptual': lpips_weights.of_objective(self)}

  def abstract_constants(self):
    """Shapes and dtypes of `constants`, without the files."""
    if not self.perceptual_weight:
      return {}
    return {'perceptual': lpips.abstract_params()}

  def initial_statistics(self):
    """What is carried from step to step.

    Returns:
      'code_use' float32 [codebook_size], use of each code per batch, averaged over steps. It begins
      at 0, so that with revival the first codes are latents of the first batch that is quantized.
      With a discriminator 'r1' float32 [], the last penalty. With an average 'average', float32, as
      the tokenizer's parameters.
    """
    statistics = {'code_use': jnp.zeros((self.model.codebook_size,), jnp.float32)}
    if self.adversarial_weight:
      statistics['r1'] = jnp.zeros((), jnp.float32)
    if self.ema:
      params = nn.meta.unbox(jax.eval_shape(self.init, jax.random.key(0)))
      statistics['average'] = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), {name: params[name] for name in PARTS}
      )
    return statistics

  def loss(self, params, batch, dropout_keys, step):
    """The training loss.

    Args:
      params: of `init`, with `constants`.
      batch: {'images': uint8 [batch, height, width, 3]}.
      dropout_keys: not used; there is no dropout.
      step: int32 [], steps done before this one.

    Returns:
      float32 [], the tokenizer's loss and the discriminator's, and a dict with 'metrics' (scalars;
      'loss' is the tokenizer's), 'latents' and 'code_use'.
    """
    del dropout_keys
    images = batch['images'].astype(jnp.float32) / 255.0
    out, sown = vit_vqgan.ViTVQGAN(self.model).apply(
      {'params': params}, images, step >= self.quantize_from, mutable=['intermediates']
    )
    quantizer_loss = jnp.where(step >= self.quantize_from, out['quantizer_loss'], 0.0)
    loss, metrics = self._reconstruction_loss(params, images, out['mean'], out['log_scale'])
    loss = loss + self.quantizer_weight * quantizer_loss
    metrics['quantizer_loss'] = out['quantizer_loss']
    of_discriminator = 0.0
    if self.adversarial_weight:
      (hidden,) = sown['intermediates']['decoder']['last_hidden']
      of_tokenizer, of_discriminator, more = self._adversarial_losses(
        params, images, out, hidden, step
      )
      loss = loss + of_tokenizer
      metrics |= more
    return loss + of_discriminator, {
      'metrics': metrics | {'loss': loss},
      'latents': out['latents'],
      'code_use': self._count(out['tokens']),
    }

  def _reconstruction_loss(self, params, images, mean, log_scale):
    """The weighted sum of what compares pictures with their reconstructions, and its parts."""
    reconstructions = vit_vqgan.to_pixels(mean)
    metrics = {
      'l2': jnp.mean(jnp.square(reconstructions - images)),
      'coarse_l2': jnp.mean(jnp.square(_coarse(reconstructions) - _coarse(images))),
      'logit_laplace': jnp.mean(logit_laplace_loss(images, mean, log_scale, self.least_log_scale)),
    }
    if self.perceptual_weight:
      metrics['perceptual'] = jnp.mean(
        lpips.LPIPS().apply({'params': params['perceptual']}, images, reconstructions)
      )
    loss = sum(getattr(self, f'{name}_weight') * value for name, value in metrics.items())
    return loss, metrics | {'psnr': jnp.mean(psnr(images, jnp.clip(reconstructions, 0.0, 1.0)))}

  def _adversarial_losses(self, params, images, out, hidden, step):
    """The weighted adversarial loss, the discriminator's loss and metrics; 0 until they begin."""

    def losses():
      of_tokenizer, of_discriminator, metrics = adversarial.losses(
        self.discriminator, params['discriminator'], images, vit_vqgan.to_pixels(out['mean'])
      )
      weight = self.adversarial_weight * (
        self._adaptive_weight(params, images, out, hidden) if self.adversarial_adaptive else 1.0
      )
      penalty = jax.lax.cond(
        step % self.r1_every == 0,
        lambda: adversarial.r1_penalty(self.discriminator, params['discriminator'], images),
        lambda: jnp.float32(0.0),
      )
      metrics |= {
        'adversarial': of_tokenizer,
        'adversarial_weight': jnp.float32(weight),
        'discriminator': of_discriminator,
        'r1': penalty,
      }
      of_discriminator = of_discriminator + 0.5 * self.r1_weight * self.r1_every * penalty
      return weight * of_tokenizer, of_discriminator, metrics

    if self.adversarial_from <= 0:
      return losses()
    zeros = lambda: jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(losses)
    )
    return jax.lax.cond(step >= self.adversarial_from, losses, zeros)

  def _adaptive_weight(self, params, images, out, hidden):
    """VQGAN's ratio of gradient norms at the decoder's last layer."""
    stop = jax.lax.stop_gradient
    params, mean, log_scale = stop((params, out['mean'], out['log_scale']))
    rest = jax.grad(
      lambda *outputs: self._reconstruction_loss(params, images, *outputs)[0], argnums=(0, 1)
    )(mean, log_scale)
    of_mean = jax.grad(
      lambda mean: adversarial.losses(
        self.discriminator, params['discriminator'], images, vit_vqgan.to_pixels(mean)
      )[0]
    )(mean)
    patches = lambda *parts: vit_vqgan.to_patches(
      jnp.concatenate(parts, axis=-1), self.model.patch_size
    )
    return adversarial.adaptive_weight(
      stop(hidden), patches(*rest), patches(of_mean, jnp.zeros_like(of_mean))
    )

  def weight(self, batch):
    """What a batch counts in a mean over several: its pictures, float32 []."""
    return jnp.float32(len(batch['images']))

  def merge(self, aux):
    """What `loss` says besides metrics, of several microbatches: from [microbatches, ...].

    Microbatch k of n holds the pictures k, k + n, k + 2 · n ...; here they are in their order.
    """
    latents = aux['latents'].swapaxes(0, 1)
    return {
      'latents': latents.reshape((-1,) + latents.shape[2:]),
      'code_use': jnp.sum(aux['code_use'], axis=0),
    }

  def after_step(self, params, statistics, aux, step, rng):
    """Revives dead codes and updates the use of codes and the average of weights.

    Args:
      params: after the optimiser's update.
      statistics: of the step before.
      aux: of `loss`.
      step: int32 [], steps done before this one.
      rng: a key.

    Returns:
      params, statistics and further metrics.
    """
    use = 0.98 * statistics['code_use'] + 0.02 * aux['code_use']
    use = jnp.where(step > self.quantize_from, use, 0.0)
    dead = use < self.dead_below
    metrics = {
      'codes_alive': 1.0 - jnp.mean(dead),
      'codes_in_batch': jnp.mean(aux['code_use'] > 0),
      'code_perplexity': _perplexity(aux['code_use']),
    }
    revived = None
    if self.revive_every and 'quantizer' not in self.frozen:
      since = step - self.quantize_from
      now = (since >= 0) & (since % self.revive_every == 0) & (step < self.revive_until)
      table = params['quantizer']['codebook']['table']
      table, use = jax.lax.cond(
        now, lambda: revive(table, use, dead, aux['latents'], rng), lambda: (table, use)
      )
      revived = jnp.any(table != params['quantizer']['codebook']['table'], axis=1)
      params = params | {'quantizer': {'codebook': {'table': table}}}
    statistics = statistics | {'code_use': use}
    if self.adversarial_weight:
      due = (step >= self.adversarial_from) & (step % self.r1_every == 0)
      statistics['r1'] = jnp.where(due, aux['metrics']['r1'], statistics['r1'])
      metrics['r1'] = statistics['r1']
    if self.ema:
      average = state_lib.update_average(
        statistics['average'], {name: params[name] for name in PARTS}, step, self.ema
      )
      if revived is not None:  # A code that begins anew has no past to be averaged with.
        old = average['quantizer']['codebook']['table']
        table = jnp.where(revived[:, None], params['quantizer']['codebook']['table'], old)
        average = average | {'quantizer': {'codebook': {'table': table}}}
      statistics['average'] = average
    return params, statistics, metrics

  def evaluate(self, params, batch):
    """Measures of each example: 'l2', 'psnr' [batch] and 'tokens' [batch, length]."""
    images = batch['images'].astype(jnp.float32) / 255.0
    tokens, reconstructions = self._reconstruct(params, images)
    error = jnp.mean(jnp.square(images - reconstructions), axis=(1, 2, 3))
    return {'l2': error, 'psnr': psnr(images, reconstructions), 'tokens': tokens}

  def summarize(self, measures: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over examples, the share of codes that they use, and the perplexity of that use."""
    counts = np.bincount(measures['tokens'].ravel(), minlength=self.model.codebook_size)
    return {
      'l2': float(measures['l2'].mean()),
      'psnr': float(measures['psnr'].mean()),
      'codes_used': float(np.mean(counts > 0)),
      'code_perplexity': float(_perplexity(counts.astype(np.float32))),
    }

  def painter(self):
    """What draws pictures beside their reconstructions.

    Returns:
      A function of `params`, a batch as in `loss` and nothing else, which returns
      {'reconstructions': uint8 [batch, height, 2 · width, 3]}; and that nothing.
    """

    def draw(params, batch, nothing):
      del nothing
      images = batch['images'].astype(jnp.float32) / 255.0
      _, reconstructions = self._reconstruct(params, images)
      pairs = jnp.concatenate([images, reconstructions], axis=2)
      return {'reconstructions': jnp.round(pairs * 255.0).astype(jnp.uint8)}

    return draw, {}

  def step_flops(self, batch_size: int) -> int:
    """Model FLOPs of a training step, without those of the lazy R1 penalty."""
    size, total = self.model.image_size, 3 * flops.tokenizer_forward(self.model)
    if self.perceptual_weight:
      total += PERCEPTUAL_PASSES * flops.vgg16_forward(size)
    if self.adversarial_weight:
      total += ADVERSARIAL_PASSES * flops.discriminator_forward(self.discriminator, size)
    return batch_size * total

  def _reconstruct(self, params, images):
    module = vit_vqgan.ViTVQGAN(self.model)
    tokens = module.apply({'params': params}, images, method='tokenize')
    return tokens, module.apply({'params': params}, tokens, method='detokenize')

  def _count(self, tokens):
    return jnp.zeros((self.model.codebook_size,), jnp.float32).at[tokens.reshape(-1)].add(1.0)


def _coarse(images):
  """[batch, height, width, 3] averaged over squares of 4×4 pixels."""
  return nn.avg_pool(images, (4, 4), (4, 4))


def _perplexity(use):
  share = use / jnp.sum(use)
  return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0.0)))
