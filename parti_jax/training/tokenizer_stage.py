"""Training the image tokenizer (ViT-VQGAN, section 3; Parti, section 2.1)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax import errors
from parti_jax.models import flops
from parti_jax.models import quantizer
from parti_jax.models import vit_vqgan


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
  loss = (jnp.abs(jnp.log(x) - jnp.log1p(-x) - mean) * jnp.exp(-log_scale)
          + jnp.log(2.0 * x * (1.0 - x)) + log_scale)
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
  chance = jnp.log(jnp.maximum(1.0 - nearest, 1e-6)) + jax.random.gumbel(rng, nearest.shape)
  count = min(table.shape[0], latents.shape[0])
  chosen = latents[jax.lax.top_k(chance, count)[1]]
  turn = jnp.cumsum(dead) - 1
  revived = dead & (turn < count)
  table = jnp.where(revived[:, None], chosen[jnp.clip(turn, 0, count - 1)], table)
  return table, jnp.where(revived, 0.1, use)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TokenizerStage:
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
    quantize_from: until this step the decoder sees the latents themselves, so that there is
      something to quantize when the first codes are taken from them.
    revive_every: steps between revivals of dead codes, see `revive`; 0 for never.
    revive_until: no revival from this step on, so that the codes settle.
    frozen: parts of the tokenizer that stay as they are; ('encoder', 'quantizer') is the second
      phase, in which the decoder learns to draw the same tokens better (Parti, section 2.1).
    dead_below: a code is dead if its use per batch, averaged over about 50 steps, is below.
  """

  model: vit_vqgan.ViTVQGANConfig
  l2_weight: float = 1.0
  coarse_l2_weight: float = 0.0
  logit_laplace_weight: float = 0.1
  least_log_scale: float = -7.0
  quantizer_weight: float = 1.0
  quantize_from: int = 0
  revive_every: int = 0
  revive_until: int = 0
  dead_below: float = 0.02
  frozen: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'frozen', tuple(self.frozen))
    unknown = set(self.frozen) - {'encoder', 'quantizer', 'decoder'}
    if unknown:
      raise errors.UserError(f'TokenizerStage.frozen: {sorted(unknown)} are no parts; there are '
                             'encoder, quantizer and decoder')

  name = 'tokenizer'
  compute_dtype = property(lambda self: self.model.compute_dtype)

  def feature_lengths(self) -> dict[str, int]:
    return {'images': self.model.image_size}

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    """Pictures have no ids."""
    return {}

  def abstract_batch(self, batch_size: int):
    """Shapes and dtypes of a batch, as `loss` takes it."""
    shape = (batch_size, self.model.image_size, self.model.image_size, 3)
    return {'images': jax.ShapeDtypeStruct(shape, jnp.uint8)}

  def init(self, rng):
    """Parameters with their logical axis names."""
    module = vit_vqgan.ViTVQGAN(self.model)
    return module.init(rng, *vit_vqgan.example_inputs(self.model))['params']

  def initial_statistics(self):
    """Use of each code per batch, averaged over steps: float32 [codebook_size].

    It begins at 0, so that with revival the first codes are latents of the first batch that is
    quantized.
    """
    return {'code_use': jnp.zeros((self.model.codebook_size,), jnp.float32)}

  def loss(self, params, batch, dropout_keys, step):
    """The training loss.

    Args:
      params: of `init`.
      batch: {'images': uint8 [batch, height, width, 3]}.
      dropout_keys: not used; there is no dropout.
      step: int32 [], steps done before this one.

    Returns:
      float32 [] and a dict with 'metrics' (scalars), 'latents' and 'code_use'.
    """
    del dropout_keys
    images = batch['images'].astype(jnp.float32) / 255.0
    out = vit_vqgan.ViTVQGAN(self.model).apply(
        {'params': params}, images, step >= self.quantize_from)
    reconstructions = vit_vqgan.to_pixels(out['mean'])
    l2 = jnp.mean(jnp.square(reconstructions - images))
    coarse_l2 = jnp.mean(jnp.square(_coarse(reconstructions) - _coarse(images)))
    logit_laplace = jnp.mean(logit_laplace_loss(
        images, out['mean'], out['log_scale'], self.least_log_scale))
    quantizer_loss = jnp.where(step >= self.quantize_from, out['quantizer_loss'], 0.0)
    loss = (self.quantizer_weight * quantizer_loss + self.l2_weight * l2
            + self.coarse_l2_weight * coarse_l2
            + self.logit_laplace_weight * logit_laplace)
    metrics = {
        'l2': l2, 'coarse_l2': coarse_l2, 'logit_laplace': logit_laplace,
        'quantizer_loss': out['quantizer_loss'],
        'psnr': jnp.mean(psnr(images, jnp.clip(reconstructions, 0.0, 1.0)))}
    return loss, {'metrics': metrics, 'latents': out['latents'],
                  'code_use': self._count(out['tokens'])}

  def weight(self, batch):
    """What a batch counts in a mean over several: its pictures, float32 []."""
    return jnp.float32(len(batch['images']))

  def merge(self, aux):
    """What `loss` says besides metrics, of several microbatches: from [microbatches, ...].

    Microbatch k of n holds the pictures k, k + n, k + 2 · n ...; here they are in their order.
    """
    latents = aux['latents'].swapaxes(0, 1)
    return {'latents': latents.reshape((-1,) + latents.shape[2:]),
            'code_use': jnp.sum(aux['code_use'], axis=0)}

  def after_step(self, params, statistics, aux, step, rng):
    """Revives dead codes and updates the use of codes.

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
    metrics = {'codes_alive': 1.0 - jnp.mean(dead), 'codes_in_batch': jnp.mean(aux['code_use'] > 0),
               'code_perplexity': _perplexity(aux['code_use'])}
    if self.revive_every and 'quantizer' not in self.frozen:
      since = step - self.quantize_from
      now = (since >= 0) & (since % self.revive_every == 0) & (step < self.revive_until)
      table = params['quantizer']['codebook']['table']
      table, use = jax.lax.cond(
          now, lambda: revive(table, use, dead, aux['latents'], rng), lambda: (table, use))
      params = params | {'quantizer': {'codebook': {'table': table}}}
    return params, {'code_use': use}, metrics

  def evaluate(self, params, batch):
    """Measures of each example: 'l2', 'psnr' [batch] and 'tokens' [batch, length]."""
    images = batch['images'].astype(jnp.float32) / 255.0
    tokens, reconstructions = self._reconstruct(params, images)
    error = jnp.mean(jnp.square(images - reconstructions), axis=(1, 2, 3))
    return {'l2': error, 'psnr': psnr(images, reconstructions), 'tokens': tokens}

  def summarize(self, measures: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over examples, and the share of codes that they use."""
    used = len(np.unique(measures['tokens'])) / self.model.codebook_size
    return {'l2': float(measures['l2'].mean()), 'psnr': float(measures['psnr'].mean()),
            'codes_used': used}

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
    """Model FLOPs of a training step."""
    return 3 * batch_size * flops.tokenizer_forward(self.model)

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
