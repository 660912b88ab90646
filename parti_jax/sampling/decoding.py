"""The decoding loop: image tokens one after the other, from text, with a cache.

One program draws all positions of a batch. Nothing in it depends on which other images are in
the batch: every image has a key of its own, so that a seed means the same picture however the
images are cut into batches.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import layout

from parti_jax.core import numerics
from parti_jax.exported_model import sampling_settings
from parti_jax.models import parti as parti_lib
from parti_jax.models import token_decoder
from parti_jax.models.nn import transformer
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# Caches grow in at most this many steps: attention over places that are still empty costs time,
# and every step is a loop of its own to compile.
_MAX_SEGMENTS = 4
_MIN_SEGMENT = 64

# Caches [batch, heads, length, head_dim] on a TPU: positions are fastest in memory. A head_dim of
# 64 would be padded to the 128 lanes, and half of what a step reads would be padding.
CACHE_LAYOUT = layout.Layout((0, 1, 3, 2))


@flax.struct.dataclass
class Sampling:
  """How image tokens are drawn from logits: `SamplingSettings` as the decoding loop takes them.

  Attributes:
    guidance_scale: weight of guidance, float32 [image_length], of each position, or [], of all;
      read if guided.
    temperature: float32 [], positive; not read if greedy.
    top_k: int32 [], how many tokens to keep, 0 for all; read if filtered.
    top_p: float32 [], the probability to keep, 1 for all; read if filtered.
    exit_threshold: float32 [], see `adaptive.sample_tokens`; None has all tokens pass all layers.
    skip_threshold: float32 [], see `adaptive.sample_tokens`; None never leaves a pass out.
    guided: whether the logits without text are computed too.
    greedy: whether the likeliest token is taken instead of a draw.
    filtered: whether top_k or top_p rule out tokens.
  """

  guidance_scale: Any = 1.0
  temperature: Any = 1.0
  top_k: Any = 0
  top_p: Any = 1.0
  exit_threshold: Any = None
  skip_threshold: Any = None
  guided: bool = flax.struct.field(pytree_node=False, default=False)
  greedy: bool = flax.struct.field(pytree_node=False, default=False)
  filtered: bool = flax.struct.field(pytree_node=False, default=False)

  @classmethod
  def of(cls, settings: sampling_settings.SamplingSettings, length: int) -> Sampling:
    """Of checked settings, for pictures of `length` image tokens."""
    return cls(
      *settings.arrays(length),
      *settings.thresholds,
      guided=settings.guided,
      greedy=settings.greedy,
      filtered=settings.filtered,
    )

  def at_each_position(self, length: int) -> Sampling:
    """With a guidance scale for each of `length` positions."""
    scale = jnp.asarray(self.guidance_scale, jnp.float32)
    return self.replace(guidance_scale=jnp.broadcast_to(scale, (length,)))


def image_keys(seed, image_index):
  """Keys of images, the same for an image wherever it is in a batch.

  Args:
    seed: uint32 [].
    image_index: int32 [batch], the index of each image among those of its prompt.

  Returns:
    A key array [batch].
  """
  return jax.vmap(lambda index: jax.random.fold_in(numerics.key(seed), index))(image_index)


def empty_text(batch: int, text_length: int):
  """The text of no words, which guidance leads away from: int32 [batch, text_length]."""
  return jnp.zeros((batch, text_length), jnp.int32).at[:, 0].set(1)


def with_and_without(text_tokens):
  """Two rows for each image: int32 [batch, text_length] to [2 * batch, text_length], see `guide`.

  Both texts of an image are neighbours, so that they stay on one device of a mesh.
  """
  batch, length = text_tokens.shape
  texts = jnp.stack([text_tokens, empty_text(batch, length)], axis=1)
  return texts.reshape(2 * batch, length)


def guide(logits, guidance_scale):
  """Classifier-free guidance (Parti, section 2.4).

  Args:
    logits: float32 [2 * batch, codebook_size], with text at even rows and without at odd ones.
    guidance_scale: float32 [].

  Returns:
    float32 [batch, codebook_size].
  """
  logits = logits.reshape(-1, 2, logits.shape[-1])
  conditional, unconditional = logits[:, 0], logits[:, 1]
  return unconditional + guidance_scale * (conditional - unconditional)


def _ordered_bits(x):
  """uint32 that are ordered as the float32 they are made of."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _at_least_threshold(bits, weights, amount):
  """The largest threshold that leaves an amount of weight at or above it.

  Finds it bit by bit, 32 sums in all: sorting a codebook at every position takes longer than
  the network on a CPU.

  Args:
    bits: uint32 [batch, codebook_size].
    weights: float32 [batch, codebook_size], not negative.
    amount: float32 [batch, 1].

  Returns:
    uint32 [batch, 1].
  """

  def body(index, threshold):
    candidate = threshold | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
    above = jnp.sum(jnp.where(bits >= candidate, weights, 0.0), axis=-1, keepdims=True)
    return jnp.where(above >= amount, candidate, threshold)

  return jax.lax.fori_loop(0, 32, body, jnp.zeros_like(bits[:, :1]))


def filter_logits(logits, top_k, top_p):
  """Rules out unlikely tokens: first by `top_k`, then by `top_p` among those left.

  Tokens that are exactly as likely as the last one kept are kept too.

  Args:
    logits: float32 [batch, codebook_size].
    top_k: int32 [], how many tokens to keep; 0 keeps all.
    top_p: float32 [], the probability to keep; 1 keeps all.

  Returns:
    The logits, with -inf for the tokens that are ruled out.
  """
  bits = _ordered_bits(logits)
  count = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
  amount = jnp.broadcast_to(count.astype(jnp.float32), bits[:, :1].shape)
  kept = bits >= _at_least_threshold(bits, jnp.ones_like(logits), amount)
  mass = jnp.where(kept, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
  amount = top_p * jnp.sum(mass, axis=-1, keepdims=True)
  within = bits >= _at_least_threshold(bits, mass, amount)
  # With top_p = 1 rounding must not cost the least likely token its place.
  return jnp.where(kept & (within | (top_p >= 1.0)), logits, -jnp.inf)


def choose(logits, keys, position, sampling: Sampling):
  """Draws one token of every image.

  Args:
    logits: float32 [batch, codebook_size].
    keys: of `image_keys`.
    position: int32 [].
    sampling: how to draw.

  Returns:
    int32 [batch].
  """
  if sampling.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.filtered:
    logits = filter_logits(logits, jnp.asarray(sampling.top_k), sampling.top_p)
  # Gumbel noise turns the likeliest token into a draw; each image's noise is its own.
  noise = jax.vmap(
    lambda key: jax.random.gumbel(
      jax.random.fold_in(key, position), logits.shape[-1:], jnp.float32, mode='low'
    )
  )(keys)
  return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def in_cache_layout(state: transformer.DecoderState) -> transformer.DecoderState:
  """The state with its caches in `CACHE_LAYOUT`, on a TPU."""
  if mesh_lib.platform() != 'tpu':
    return state

  def constrain(part):
    return layout.with_layout_constraint(part, CACHE_LAYOUT)

  if mesh_lib.current() is not None:
    # XLA would gather the whole cache for the constraint; each device has one for its own part.
    spec = rules_lib.spec('activation_batch', 'activation_heads', 'activation_length', None)
    constrain = jax.shard_map(
      constrain, in_specs=spec, out_specs=spec, check_vma=False, axis_names=rules_lib.free_axes()
    )
  return state.replace(caches=jax.tree.map(constrain, state.caches))


def _grow(config, state: transformer.DecoderState, length: int) -> transformer.DecoderState:
  """The state with caches that serve the first `length` positions, the new slots empty."""

  def grow(cache, slots):
    return jnp.pad(cache, ((0, 0), (0, 0), (0, slots - cache.shape[2]), (0, 0)))

  return state.replace(
    caches=[
      tuple(grow(part, config.layer_pattern(layer).slots(length)) for part in cache)
      for layer, cache in enumerate(state.caches)
    ]
  )


def _segment_ends(patterns) -> list[int]:
  """Where caches of layers with these patterns grow: positions up to which each loop runs."""
  length = patterns[0].length
  segment = max(_MIN_SEGMENT, -(-length // _MAX_SEGMENTS))
  slots = lambda end: [pattern.slots(end) for pattern in patterns]
  ends = [end for end in range(segment, length, segment) if slots(end) != slots(end + segment)]
  return ends + [length]


def start(config, params, text_tokens) -> transformer.DecoderState:
  """The state of texts int32 [batch, text_length] from which `scan_positions` goes on."""
  return parti_lib.Parti(config).apply(
    {'params': params}, text_tokens, _segment_ends(config.patterns)[0], method='start'
  )


def scan_positions(config, step, batch: int, states):
  """Runs a step at all positions, with caches that grow where that is worth it.

  Args:
    config: PartiConfig.
    step: ((previous int32 [batch], states), position int32 []) -> ((token, states), outputs).
    batch: number of images.
    states: of `start`, a DecoderState or a tuple of them.

  Returns:
    The outputs, with a leading axis of image_length.
  """
  is_state = lambda part: isinstance(part, transformer.DecoderState)
  pieces, begin, previous = [], 0, jnp.zeros(batch, jnp.int32)
  for end in _segment_ends(config.patterns):
    states = jax.tree.map(
      lambda state, end=end: _grow(config, state, end), states, is_leaf=is_state
    )
    (previous, states), outputs = jax.lax.scan(step, (previous, states), jnp.arange(begin, end))
    pieces.append(outputs)
    begin = end
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def sample_step(config, params, keys, sampling: Sampling, carry, position):
  """Draws one image token of each image of a batch, given those before it.

  Args:
    config: PartiConfig.
    params: of `parameters.cut`.
    keys: a key for each image, [batch], see `image_keys`.
    sampling: how to draw, see `Sampling.at_each_position`.
    carry: the tokens before, int32 [batch], not read at position 0; and the DecoderState of the
      positions before. If guided it has two rows for each image, see `with_and_without`.
    position: int32 [].

  Returns:
    The next carry, and the tokens int32 [batch].
  """
  previous, state = carry
  if sampling.guided:
    previous = jnp.repeat(previous, 2)
  logits, state = token_decoder.TokenDecoder(config).apply(
    {'params': params['image_decoder']}, previous[:, None], state=state
  )
  logits = logits[:, 0]
  if sampling.guided:
    logits = guide(logits, sampling.guidance_scale[position])
  token = choose(logits, keys, position, sampling)
  return (token, in_cache_layout(state)), token


def sample_tokens(config, params, text_tokens, keys, sampling: Sampling):
  """Draws the image tokens of a batch; to be called inside a jit.

  Arrays may be sharded: the networks constrain them by their logical axis names wherever
  `flax.linen.logical_axis_rules` is set.

  Args:
    config: PartiConfig.
    params: of `parameters.cut`.
    text_tokens: int32 [batch, text_length], padded with 0.
    keys: a key for each image, [batch], see `image_keys`.
    sampling: how to draw; its thresholds are those of `adaptive.sample_tokens` and not read.

  Returns:
    int32 [batch, image_length].
  """
  sampling = sampling.at_each_position(config.image_length)
  state = start(config, params, with_and_without(text_tokens) if sampling.guided else text_tokens)
  step = functools.partial(sample_step, config, params, keys, sampling)
  return scan_positions(config, step, len(keys), state).T
