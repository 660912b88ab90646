"""The decoding loop that computes less for easy tokens: early exit, and guidance that skips a pass.

Early exit as in Confident Adaptive Language Modeling (CALM, arXiv 2207.07061): a token leaves the
decoder after the first layer whose prediction from the text is sure enough, and the layers it has
skipped take their keys and values from the hidden state that it left with (section 3). Guidance's
pass without text is left out for a token whose prediction with the text is sure already; its keys
and values are those of the pass with text, so that later tokens find the cache whole.

Both are decided for each image by itself, so that a picture does not depend on its batch. What is
saved is what no image of the batch needs: `jax.lax.cond` leaves out whole layers and passes.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from parti_jax.models import early_exit
from parti_jax.models import parti as parti_lib
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import decoding


@flax.struct.dataclass
class Usage:
  """What the tokens of a batch took.

  Attributes:
    layers: int32 [batch, image_length], decoder layers that each token passed.
    unguided: bool [batch, image_length], tokens for which guidance's pass without text was left
      out. False for all where there is no guidance.
    computed: int32 [batch, image_length, 2], decoder layers that were computed for the batch at
      each position, with text and without; the same for all images of a batch.
  """

  layers: Any
  unguided: Any
  computed: Any

  def summary(self, decoder_layers: int) -> str:
    """One line with the means over all tokens; takes numpy arrays."""
    with_text, without = self.computed[..., 0].mean(), self.computed[..., 1].mean()
    return (
      f'{self.layers.mean():.2f} of {decoder_layers} layers per token (computed for its batch: '
      f'{with_text:.2f}); the pass without text skipped for {100 * self.unguided.mean():.0f}% '
      f'of the tokens (layers of it computed: {without:.2f})'
    )


def _step_together(
  apply, layers, starts, previous, caches, position, scale, exit_threshold, guided
):
  """A position with both passes as one batch, in which both rows of an image leave together."""
  (memories, mask), rows = starts, 2 if guided else 1
  logits, caches, passed, computed, _ = apply(
    jnp.repeat(previous, rows),
    caches,
    layers,
    memories,
    mask,
    position,
    exit_threshold,
    rows,
    method='step_until',
  )
  if guided:
    logits = decoding.guide(logits, scale)
  skipped = jnp.zeros(previous.shape, bool)
  return logits, caches, passed[::rows], skipped, jnp.stack([computed, computed * (rows - 1)])


def _step_apart(
  apply, layers, starts, previous, caches, position, scale, exit_threshold, skip_threshold
):
  """A position with one pass after the other, the second for the images that need it."""
  (memories, mask), (memories_without, mask_without) = starts
  caches, caches_without = caches
  logits, caches, passed, computed, entries = apply(
    previous, caches, layers, memories, mask, position, exit_threshold, method='step_until'
  )
  skipped = early_exit.confidence(logits) >= skip_threshold
  without, caches_without, computed_without = apply(
    previous,
    caches_without,
    layers,
    memories_without,
    mask_without,
    position,
    passed,
    skipped,
    entries,
    method='step_beside',
  )
  both = jnp.stack([logits, without], axis=1).reshape(-1, logits.shape[-1])
  logits = jnp.where(skipped[:, None], logits, decoding.guide(both, scale))
  return (
    logits,
    (caches, caches_without),
    passed,
    skipped,
    jnp.stack([computed, computed_without]),
  )


def sample_tokens(
  config,
  params,
  text_tokens,
  keys,
  guidance_scale=1.0,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  exit_threshold=None,
  skip_threshold=None,
  *,
  guided: bool,
  greedy: bool,
  filtered: bool,
):
  """Draws the image tokens of a batch, as `decoding.sample_tokens` and with its other arguments.

  Args:
    config: as there, as the next ones up to `top_p`.
    params: see `config`.
    text_tokens: see `config`.
    keys: see `config`.
    guidance_scale: see `config`.
    temperature: see `config`.
    top_k: see `config`.
    top_p: see `config`.
    exit_threshold: float32 [], the confidence (`early_exit.confidence` of the prediction with text)
      from which on a token leaves; None has all tokens pass all layers.
    skip_threshold: float32 [], the confidence of the prediction with text from which on the pass
      without is left out; None never leaves it out. Looked at if guided.
    guided: as there, as the next ones.
    greedy: see `guided`.
    filtered: see `guided`.

  Returns:
    int32 [batch, image_length] and a Usage.
  """
  apply = functools.partial(parti_lib.Parti(config).apply, {'params': params.shared})
  scales = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), config.image_length)
  start = lambda texts: apply(
    texts, params.layers, decoding.first_cache_length(config), method='start'
  )
  if guided and skip_threshold is not None:
    *with_text, caches = start(text_tokens)
    *without, caches_without = start(decoding.empty_text(*text_tokens.shape))
    caches, starts = (caches, caches_without), (with_text, without)
    step = functools.partial(
      _step_apart, exit_threshold=exit_threshold, skip_threshold=skip_threshold
    )
  else:
    if guided:
      text_tokens = decoding.with_and_without(text_tokens)
    *starts, caches = start(text_tokens)
    step = functools.partial(_step_together, exit_threshold=exit_threshold, guided=guided)

  def body(carry, position):
    previous, caches = carry
    logits, caches, passed, skipped, computed = step(
      apply, params.layers, starts, previous, caches, position, scales[position]
    )
    if mesh_lib.platform() == 'tpu':
      caches = jax.tree.map(decoding.in_cache_layout, caches)
    token = decoding.choose(
      logits,
      keys,
      position,
      temperature,
      jnp.asarray(top_k),
      top_p,
      greedy=greedy,
      filtered=filtered,
    )
    return (token, caches), (token, passed, skipped, computed)

  tokens, layers, unguided, computed = decoding.scan_positions(
    config, body, jnp.zeros(len(keys), jnp.int32), caches
  )
  computed = jnp.broadcast_to(computed, (len(keys),) + computed.shape)
  return tokens.T, Usage(layers.T, unguided.T, computed)
