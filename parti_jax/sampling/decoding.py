"""The decoding loop: samples image tokens from text, one after another, with a cache.

One program samples all positions of a batch. Each image has its own key, and nothing depends on the
other images of the batch, so a seed gives the same picture however the images are batched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import layout
from jax.typing import ArrayLike
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import Key
from jaxtyping import UInt32

from parti_jax.core import numerics
from parti_jax.exported_model import sampling_settings
from parti_jax.models import generators
from parti_jax.models.nn import transformer
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# Maximum number of sizes that the caches grow through. Attention over empty slots costs time, but
# each size adds a loop to compile.
_MAX_SEGMENTS = 4
_MIN_SEGMENT = 64

# Caches [batch, heads, length, head_dim] on a TPU have positions as their minor axis. A head_dim of
# 64 would be padded to the 128 lanes, so half of the bytes that a step reads would be padding.
CACHE_LAYOUT = layout.Layout((0, 1, 3, 2))


class Sampling(flax.struct.PyTreeNode):
  """How to sample image tokens from logits: `SamplingSettings` in the decoding loop's form.

  Attributes:
    guidance_scale: weight of guidance at each position, float32 [image_length], or at all, []; used
      if `guided`.
    temperature: float32 [], positive; used unless `greedy`.
    top_k: int32 [], number of tokens to keep, 0 for all; used if `filtered`.
    top_p: float32 [], probability to keep, 1 for all; used if `filtered`.
    exit_threshold: float32 [], an argument of early exit, which `adaptive.sample_tokens` describes;
      None disables it.
    skip_threshold: float32 [], an argument of `adaptive.sample_tokens`; None always computes the
      pass without text.
    window: number of drafted tokens that a pass checks, an argument of `speculative.sample_tokens`;
      0 samples one token after the other.
    drafts: how to draft tokens at new positions of the window.
    rule: how to accept drafts.
    cache: how to hold keys and values, a name in `sampling_settings.CACHES`.
    guided: whether to compute the logits without text too.
    greedy: whether to take the likeliest token instead of sampling.
    filtered: whether `top_k` or `top_p` excludes tokens.
  """

  guidance_scale: ArrayLike = 1.0
  temperature: ArrayLike = 1.0
  top_k: ArrayLike = 0
  top_p: ArrayLike = 1.0
  exit_threshold: ArrayLike | None = None
  skip_threshold: ArrayLike | None = None
  window: int = flax.struct.field(pytree_node=False, default=0)
  drafts: str = flax.struct.field(pytree_node=False, default='left')
  rule: str = flax.struct.field(pytree_node=False, default='ratio')
  cache: str = flax.struct.field(pytree_node=False, default='float')
  guided: bool = flax.struct.field(pytree_node=False, default=False)
  greedy: bool = flax.struct.field(pytree_node=False, default=False)
  filtered: bool = flax.struct.field(pytree_node=False, default=False)

  @classmethod
  def of(
    cls, settings: sampling_settings.SamplingSettings, length: int, cache: str = 'float'
  ) -> Sampling:
    """Converts checked settings, for pictures of `length` image tokens."""
    guidance_scale, temperature, top_k, top_p = settings.arrays(length)
    exit_threshold, skip_threshold = settings.thresholds
    return cls(
      guidance_scale=guidance_scale,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      exit_threshold=exit_threshold,
      skip_threshold=skip_threshold,
      window=min(settings.speculative_window, length),
      drafts=settings.speculative_drafts,
      rule=settings.speculative_rule,
      cache=cache,
      guided=settings.guided,
      greedy=settings.greedy,
      filtered=settings.filtered,
    )

  def at_each_position(self, length: int) -> Sampling:
    """Returns a copy with a guidance scale for each of `length` positions."""
    scale = jnp.asarray(self.guidance_scale, jnp.float32)
    return self.replace(guidance_scale=jnp.broadcast_to(scale, (length,)))


class Steering(flax.struct.PyTreeNode):
  """What tokens follow besides the prompts; each field may be None.

  Attributes:
    others: text tokens of guidance's other side, in place of the empty text.
    text_weights: weight of each text token of the prompts, as `prompt_weights` describes.
    tokens: image tokens, of which each image takes over those in `kept` instead of sampling them.
    kept: which tokens; there is one if and only if there is the other.
  """

  others: Int32[Array, 'batch text_length'] | None = None
  text_weights: Float32[Array, 'batch text_length'] | None = None
  tokens: Int32[Array, 'batch image_length'] | None = None
  kept: Bool[Array, 'batch image_length'] | None = None


def image_keys(
  seed: UInt32[Array, ''] | int, image_index: Int32[Array, 'batch']
) -> Key[Array, 'batch']:
  """Returns the keys of images, which don't depend on an image's place in the batch.

  Args:
    seed: the seed of all images.
    image_index: the index of each image among the images of its prompt.
  """
  return jax.vmap(lambda index: jax.random.fold_in(numerics.key(seed), index))(image_index)


def with_and_without(
  config: generators.Config,
  text_tokens: Int32[Array, 'batch text_length'],
  others: Int32[Array, 'batch text_length'] | None = None,
) -> Int32[Array, '2*batch text_length']:
  """Inserts a row with the empty text after each row, for `guide`.

  The two texts of an image are adjacent, so they stay on one device of a mesh.

  Args:
    config: sizes of the network.
    text_tokens: the texts.
    others: texts to insert instead of the empty one.
  """
  batch, length = text_tokens.shape
  if others is None:
    others = generators.empty_text(config, text_tokens)
  return jnp.stack([text_tokens, others], axis=1).reshape(2 * batch, length)


def guide(
  logits: Float32[Array, 'rows *places codebook'],
  guidance_scale: Float32[Array, ''] | Float32[Array, 'rows//2 *places 1'] | float,
) -> Float32[Array, 'rows//2 *places codebook']:
  """Applies classifier-free guidance (Parti, section 2.4).

  Args:
    logits: logits with text in even rows, and without text in odd rows.
    guidance_scale: weight of guidance, of all places or of each.
  """
  logits = logits.reshape(-1, 2, *logits.shape[1:])
  conditional, unconditional = logits[:, 0], logits[:, 1]
  return unconditional + guidance_scale * (conditional - unconditional)


def _ordered_bits(x: Float32[Array, '*places']) -> UInt32[Array, '*places']:
  """Maps float32 numbers to integers in the same order."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _at_least_threshold(
  bits: UInt32[Array, '*places codebook'],
  weights: Float32[Array, '*places codebook'],
  amount: Float32[Array, '*places 1'],
) -> UInt32[Array, '*places 1']:
  """Returns the largest threshold for which the weights at or above it sum to at least `amount`.

  Finds it bit by bit, with 32 sums: on a CPU, sorting the codebook at each position takes longer
  than the network.

  Args:
    bits: the numbers to compare with the threshold.
    weights: nonnegative weights of these numbers.
    amount: the sum required at each place.
  """

  def body(index, threshold):
    candidate = threshold | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
    above = jnp.sum(jnp.where(bits >= candidate, weights, 0.0), axis=-1, keepdims=True)
    return jnp.where(above >= amount, candidate, threshold)

  return jax.lax.fori_loop(0, 32, body, jnp.zeros_like(bits[..., :1]))


def filter_logits(
  logits: Float32[Array, '*places codebook'],
  top_k: Int32[Array, ''],
  top_p: Float32[Array, ''],
) -> Float32[Array, '*places codebook']:
  """Excludes unlikely tokens: first by `top_k`, then by `top_p` among the rest.

  Tokens that are exactly as likely as the last one kept are kept too.

  Args:
    logits: the logits of each token.
    top_k: number of tokens to keep; 0 keeps all.
    top_p: probability to keep; 1 keeps all.

  Returns:
    The logits, with -inf for excluded tokens.
  """
  bits = _ordered_bits(logits)
  count = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
  amount = jnp.broadcast_to(count.astype(jnp.float32), bits[..., :1].shape)
  kept = bits >= _at_least_threshold(bits, jnp.ones_like(logits), amount)
  mass = jnp.where(kept, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
  amount = top_p * jnp.sum(mass, axis=-1, keepdims=True)
  within = bits >= _at_least_threshold(bits, mass, amount)
  # With top_p = 1, rounding must not exclude the least likely token.
  return jnp.where(kept & (within | (top_p >= 1.0)), logits, -jnp.inf)


def sampled_logits(
  logits: Float32[Array, '*places codebook'], sampling: Sampling
) -> Float32[Array, '*places codebook']:
  """Returns logits whose softmax is the distribution to sample from: with temperature and filters.

  Args:
    logits: the logits of each token, after guidance.
    sampling: how to sample; not greedily.
  """
  logits = logits / sampling.temperature
  if not sampling.filtered:
    return logits
  return filter_logits(logits, jnp.asarray(sampling.top_k), jnp.asarray(sampling.top_p))


def gumbel_noise(
  keys: Key[Array, 'batch'], position: Int32[Array, ''] | Int32[Array, 'batch'], codebook_size: int
) -> Float32[Array, 'batch {codebook_size}']:
  """Returns noise, of each image's own key, that turns the argmax of logits into a sample.

  Args:
    keys: the result of `image_keys`.
    position: the position of the tokens, in all images or in each.
    codebook_size: number of codes.
  """
  return jax.vmap(
    lambda key, position: jax.random.gumbel(
      jax.random.fold_in(key, position), (codebook_size,), jnp.float32, mode='low'
    )
  )(keys, jnp.broadcast_to(position, keys.shape))


def likeliest(logits: Float32[Array, '*places codebook']) -> Int32[Array, '*places']:
  """Returns the first token with the largest logit.

  Args:
    logits: the logits of each token, perhaps with noise; none is NaN.
  """
  if mesh_lib.platform() == 'cpu':
    # XLA computes an argmax number by number, and with it all that leads to its numbers, such as the
    # logarithms of `gumbel_noise`. A maximum is computed by vectors. On a split codebook it would be
    # one more exchange between devices.
    logits = logits == jnp.max(logits, axis=-1, keepdims=True)
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def choose(
  logits: Float32[Array, 'batch codebook'],
  keys: Key[Array, 'batch'],
  position: Int32[Array, ''],
  sampling: Sampling,
) -> Int32[Array, 'batch']:
  """Samples one token for each image.

  Args:
    logits: the logits of each image.
    keys: the result of `image_keys`.
    position: the position of the tokens.
    sampling: how to sample.
  """
  if sampling.greedy:
    return likeliest(logits)
  logits = sampled_logits(logits, sampling)
  return likeliest(logits + gumbel_noise(keys, position, logits.shape[-1]))


def in_cache_layout(state: transformer.DecoderState) -> transformer.DecoderState:
  """Lays out the caches of a state as CACHE_LAYOUT on a TPU; scales have positions last anyway."""
  if mesh_lib.platform() != 'tpu':
    return state

  def constrain(part):
    return layout.with_layout_constraint(part, CACHE_LAYOUT)

  if mesh_lib.current() is not None:
    # Constraining the whole cache would make XLA gather it, so each device constrains its part.
    spec = rules_lib.spec('activation_batch', 'activation_heads', 'activation_length', None)
    constrain = jax.shard_map(
      constrain, in_specs=spec, out_specs=spec, check_vma=False, axis_names=rules_lib.free_axes()
    )
  of_vectors = lambda part: constrain(part) if part.ndim == 4 else part
  return state.replace(caches=jax.tree.map(of_vectors, state.caches))


def grow(
  config: generators.Config, state: transformer.DecoderState, length: int
) -> transformer.DecoderState:
  """Enlarges the caches of a state, with empty slots, for the first `length` positions."""

  def grow(cache, num_slots):
    more = (0, num_slots - cache.shape[2])
    return jnp.pad(cache, [more if axis == 2 else (0, 0) for axis in range(cache.ndim)])

  grown = []
  for layer, cache in enumerate(state.caches):
    num_slots = generators.layer_pattern(config, layer).num_slots(length)
    grown.append(jax.tree.map(functools.partial(grow, num_slots=num_slots), cache))
  return state.replace(caches=grown)


def _segment_ends(patterns) -> list[int]:
  """Returns the position at which each loop ends, and the caches of these patterns grow."""
  length = patterns[0].length
  segment = max(_MIN_SEGMENT, -(-length // _MAX_SEGMENTS))
  slots = lambda end: [pattern.num_slots(end) for pattern in patterns]
  ends = [end for end in range(segment, length, segment) if slots(end) != slots(end + segment)]
  return ends + [length]


def init_state(
  config: generators.Config,
  params: dict[str, Any],
  text_tokens: Int32[Array, 'batch text_length'],
  length: int | None = None,
  cache: str = 'float',
) -> transformer.DecoderState:
  """Encodes texts and returns the decoder's state before the first token.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    text_tokens: tokens of the prompts, padded with 0.
    length: number of positions that the caches can hold; by default as many as `scan_positions`
      starts with.
    cache: how to hold keys and values, a name in `sampling_settings.CACHES`.
  """
  apply: Callable[..., Any] = generators.module(config).apply
  length = _segment_ends(config.patterns)[0] if length is None else length
  return apply({'params': params}, text_tokens, length, cache == 'int8', method='encode_text')


def weigh_texts(
  config: generators.Config,
  params: dict[str, Any],
  state: transformer.DecoderState,
  text_weights: Float32[Array, 'batch text_length'],
) -> transformer.DecoderState:
  """Weighs the text tokens in the cross-attention of a state, as `prompt_weights` describes.

  Args:
    config: sizes of the network, of a kind with cross-attention.
    params: the result of `parameters.for_sampling`.
    state: a result of `init_state`, with a cache in floating point.
    text_weights: the weight of each text token.
  """
  empty = init_state(
    config, params, generators.empty_text(config, jnp.zeros((1, config.text_length), jnp.int32)), 1
  )
  there = empty.text_mask[0, 0, 0][:, None]
  weights = text_weights[:, None, :, None]

  def weigh(part, of_empty):
    base = jnp.sum(jnp.where(there, of_empty, 0.0), axis=2, keepdims=True) / jnp.sum(there)
    weighed = base + weights * (part.astype(jnp.float32) - base)
    return jnp.where(weights == 1, part, weighed.astype(part.dtype))

  return state.replace(texts=jax.tree.map(weigh, state.texts, empty.texts))


def cache_length(config: generators.Config, end: int) -> int:
  """Returns the number of positions that caches hold while `scan_positions` runs up to `end`."""
  return next(length for length in _segment_ends(config.patterns) if length >= end)


def begin(
  config: generators.Config,
  params: dict[str, Any],
  text_tokens: Int32[Array, 'batch text_length'],
  sampling: Sampling,
  steering: Steering,
  prefix: int = 0,
) -> tuple[Int32[Array, 'batch'], transformer.DecoderState]:
  """Returns what `sample_step` carries before the first token that it samples.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    text_tokens: tokens of the prompts, padded with 0.
    sampling: how to sample.
    steering: what to follow besides.
    prefix: number of first tokens that all images keep; less than all. One pass of the decoder takes
      them in.
  """
  texts = text_tokens
  if sampling.guided:
    texts = with_and_without(config, text_tokens, steering.others)
  length = cache_length(config, prefix + 1)
  state = init_state(config, params, texts, length, sampling.cache)
  if steering.text_weights is not None:
    weights = jnp.asarray(steering.text_weights)
    if sampling.guided:
      weights = jnp.stack([weights, jnp.ones_like(weights)], axis=1).reshape(texts.shape)
    state = weigh_texts(config, params, state, weights)
  if not prefix:
    return jnp.zeros(len(text_tokens), jnp.int32), state
  assert steering.tokens is not None
  tokens = jnp.asarray(steering.tokens)[:, :prefix]
  inputs = jnp.repeat(
    jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))), 2 if sampling.guided else 1, axis=0
  )
  apply: Callable[..., Any] = generators.decoder(config).apply
  _, state = apply({'params': params['image_decoder']}, inputs, state=state)
  return tokens[:, -1], in_cache_layout(state)


def scan_positions(
  config: generators.Config,
  step: Callable[[Any, Any], Any],
  batch: int,
  states: Any,
  first: int = 0,
  previous: Int32[Array, 'batch'] | None = None,
) -> Any:
  """Runs a step at all positions, with caches that grow where it saves time.

  Args:
    config: sizes of the network.
    step: maps (previous tokens, states) and a position to (tokens, states) and the outputs; tokens
      are int32 [batch], a position is int32 [].
    batch: number of images.
    states: the result of `init_state`, or a tuple of such states.
    first: the position to begin with.
    previous: the token before it; None at position 0.

  Returns:
    The outputs, with a leading axis of the positions.
  """
  is_state = lambda part: isinstance(part, transformer.DecoderState)
  previous = jnp.zeros(batch, jnp.int32) if previous is None else previous
  pieces, begin = [], first
  for end in _segment_ends(config.patterns):
    if end <= first:
      continue
    states = jax.tree.map(lambda state, end=end: grow(config, state, end), states, is_leaf=is_state)
    (previous, states), outputs = jax.lax.scan(step, (previous, states), jnp.arange(begin, end))
    pieces.append(outputs)
    begin = end
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def sample_step(
  config: generators.Config,
  params: dict[str, Any],
  keys: Key[Array, 'batch'],
  sampling: Sampling,
  carry: tuple[Int32[Array, 'batch'], transformer.DecoderState],
  position: Int32[Array, ''],
  steering: Steering | None = None,
) -> tuple[tuple[Int32[Array, 'batch'], transformer.DecoderState], Int32[Array, 'batch']]:
  """Samples one image token for each image of a batch, given the previous tokens.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    keys: the result of `image_keys`.
    sampling: how to sample; the result of `Sampling.at_each_position`.
    carry: the previous tokens, which are ignored at position 0, and the state after the previous
      positions. If guided, the state has two rows for each image, as `with_and_without` makes them.
    position: the position of the tokens.
    steering: which tokens are kept; None for none.

  Returns:
    The next carry, and the tokens.
  """
  previous, state = carry
  if sampling.guided:
    previous = jnp.repeat(previous, 2)
  apply: Callable[..., Any] = generators.decoder(config).apply
  logits, state = apply({'params': params['image_decoder']}, previous[:, None], state=state)
  logits = logits[:, 0]
  if sampling.guided:
    logits = guide(logits, jnp.asarray(sampling.guidance_scale)[position])
  token = choose(logits, keys, position, sampling)
  if steering is not None and steering.kept is not None and steering.tokens is not None:
    kept, tokens = (jnp.asarray(part)[:, position] for part in (steering.kept, steering.tokens))
    token = jnp.where(kept, tokens, token)
  return (token, in_cache_layout(state)), token


def sample_tokens(
  config: generators.Config,
  params: dict[str, Any],
  text_tokens: Int32[Array, 'batch text_length'],
  keys: Key[Array, 'batch'],
  sampling: Sampling,
  steering: Steering | None = None,
  prefix: int = 0,
) -> Int32[Array, 'batch image_length']:
  """Samples the image tokens of a batch; call it inside `jax.jit`.

  Arrays may be sharded: within `flax.linen.logical_axis_rules`, the networks constrain them by
  their logical axis names.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    text_tokens: tokens of the prompts, padded with 0.
    keys: the result of `image_keys`.
    sampling: how to sample; this function ignores the thresholds, which `adaptive.sample_tokens`
      uses, and the window, which `speculative.sample_tokens` uses.
    steering: what to follow besides the prompts; None for nothing.
    prefix: an argument of `begin`.
  """
  sampling = sampling.at_each_position(config.image_length)
  steering = Steering() if steering is None else steering
  previous, state = begin(config, params, text_tokens, sampling, steering, prefix)
  step = functools.partial(sample_step, config, params, keys, sampling, steering=steering)
  drawn = scan_positions(config, step, len(keys), state, prefix, previous).T
  if not prefix:
    return drawn
  return jnp.concatenate([jnp.asarray(steering.tokens)[:, :prefix], drawn], axis=1)
