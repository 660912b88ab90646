"""The decoding loop: image tokens one after the other, from text, with a cache.

One program draws all positions of a batch. Nothing in it depends on which other images are in
the batch: every image has a key of its own, so that a seed means the same picture however the
images are cut into batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import layout

from parti_jax.core import numerics
from parti_jax.models import parti as parti_lib
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# Caches grow in at most this many steps: attention over places that are still empty costs time,
# and every step is a loop of its own to compile.
_MAX_SEGMENTS = 4
_MIN_SEGMENT = 64

# Caches [batch, heads, length, head_dim] on a TPU: positions are fastest in memory. A head_dim of
# 64 would be padded to the 128 lanes, and half of what a step reads would be padding.
CACHE_LAYOUT = layout.Layout((0, 1, 3, 2))


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


def choose(logits, keys, position, temperature, top_k, top_p, *, greedy, filtered):
  """Draws one token of every image.

  Args:
    logits: float32 [batch, codebook_size].
    keys: of `image_keys`.
    position: int32 [].
    temperature: float32 [], positive unless greedy.
    top_k: int32 [].
    top_p: float32 [].
    greedy: whether to take the likeliest token instead.
    filtered: whether top_k and top_p are looked at.

  Returns:
    int32 [batch].
  """
  if greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if filtered:
    logits = filter_logits(logits, top_k, top_p)
  # Gumbel noise turns the likeliest token into a draw; each image's noise is its own.
  noise = jax.vmap(
    lambda key: jax.random.gumbel(
      jax.random.fold_in(key, position), logits.shape[-1:], jnp.float32, mode='low'
    )
  )(keys)
  return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def in_cache_layout(cache):
  """A cache in `CACHE_LAYOUT`."""

  def constrain(part):
    return layout.with_layout_constraint(part, CACHE_LAYOUT)

  if mesh_lib.current() is None:
    return constrain(cache)
  # XLA would gather the whole cache for the constraint; each device has one for its own part.
  spec = rules_lib.spec('activation_batch', 'activation_heads', 'activation_length', None)
  return jax.shard_map(
    constrain, in_specs=spec, out_specs=spec, check_vma=False, axis_names=rules_lib.free_axes()
  )(cache)


def _grow(config, caches, length: int):
  """Caches that serve the first `length` positions, the new slots empty; or a tuple of such."""
  if isinstance(caches, tuple):
    return tuple(_grow(config, part, length) for part in caches)

  def grow(cache, slots):
    return jnp.pad(cache, ((0, 0), (0, 0), (0, slots - cache.shape[2]), (0, 0)))

  return [
    tuple(grow(part, config.layer_pattern(layer).slots(length)) for part in cache)
    for layer, cache in enumerate(caches)
  ]


def _segment_ends(patterns) -> list[int]:
  """Where caches of layers with these patterns grow: positions up to which each loop runs."""
  length = patterns[0].length
  segment = max(_MIN_SEGMENT, -(-length // _MAX_SEGMENTS))
  slots = lambda end: [pattern.slots(end) for pattern in patterns]
  ends = [end for end in range(segment, length, segment) if slots(end) != slots(end + segment)]
  return ends + [length]


def first_cache_length(config) -> int:
  """Positions that the caches serve with which `scan_positions` begins."""
  return _segment_ends(config.patterns)[0]


def scan_positions(config, body, token, caches):
  """Runs a step at all positions, with caches that grow where that is worth it.

  Args:
    config: PartiConfig.
    body: ((token, caches), position int32 []) -> ((token, caches), outputs).
    token: int32 [batch], carried from each position to the next.
    caches: of the first `first_cache_length` positions, or a tuple of several.

  Returns:
    The outputs, with a leading axis of image_length.
  """
  pieces, start = [], 0
  for end in _segment_ends(config.patterns):
    (token, caches), outputs = jax.lax.scan(
      body, (token, _grow(config, caches, end)), jnp.arange(start, end)
    )
    pieces.append(outputs)
    start = end
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def sample_step(
  config,
  params,
  memories,
  mask,
  previous,
  caches,
  keys,
  position,
  guidance_scale=1.0,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  *,
  guided: bool,
  greedy: bool,
  filtered: bool,
):
  """Draws one image token of each image of a batch, given those before it.

  Args:
    config: PartiConfig.
    params: a `parameters.Parameters`.
    memories: of `Parti.start`, as `mask` and, at first, `caches`. If guided they have two rows for
      each image, with its text and without.
    mask: see `memories`.
    previous: int32 [batch], the tokens before; ignored at position 0.
    caches: see `memories`; afterwards those of the step before.
    keys: a key for each image, [batch], see `image_keys`.
    position: int32 [].
    guidance_scale: float32 [], see SamplingSettings, as the next ones; looked at if guided.
    temperature: float32 [].
    top_k: int32 [].
    top_p: float32 [].
    guided: whether the logits without text are computed too.
    greedy: whether to take the likeliest token.
    filtered: whether top_k or top_p rule out tokens.

  Returns:
    int32 [batch] and the caches with this position written.
  """
  logits, caches = parti_lib.Parti(config).apply(
    {'params': params.shared},
    jnp.repeat(previous, 2 if guided else 1),
    caches,
    params.layers,
    memories,
    mask,
    position,
    method='step',
  )
  if mesh_lib.platform() == 'tpu':
    caches = jax.tree.map(in_cache_layout, caches)
  if guided:
    logits = guide(logits, guidance_scale)
  token = choose(
    logits, keys, position, temperature, jnp.asarray(top_k), top_p, greedy=greedy, filtered=filtered
  )
  return token, caches


def sample_tokens(
  config,
  params,
  text_tokens,
  keys,
  guidance_scale=1.0,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  *,
  guided: bool,
  greedy: bool,
  filtered: bool,
):
  """Draws the image tokens of a batch; to be called inside a jit.

  Arrays may be sharded: the networks constrain them by their logical axis names wherever
  `flax.linen.logical_axis_rules` is set.

  Args:
    config: PartiConfig.
    params: a `parameters.Parameters`.
    text_tokens: int32 [batch, text_length], padded with 0.
    keys: a key for each image, [batch], see `image_keys`.
    guidance_scale: float32 [image_length], of each position, or [], of all; see SamplingSettings;
      looked at if guided.
    temperature: float32 [].
    top_k: int32 [].
    top_p: float32 [].
    guided: whether to compute the logits without text too.
    greedy: whether to take the likeliest token.
    filtered: whether top_k or top_p rule out tokens.

  Returns:
    int32 [batch, image_length].
  """
  batch = text_tokens.shape[0]
  if guided:
    text_tokens = with_and_without(text_tokens)
  scales = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), config.image_length)
  memories, mask, caches = parti_lib.Parti(config).apply(
    {'params': params.shared},
    text_tokens,
    params.layers,
    first_cache_length(config),
    method='start',
  )

  def body(carry, position):
    token, caches = sample_step(
      config,
      params,
      memories,
      mask,
      *carry,
      keys,
      position,
      scales[position],
      temperature,
      top_k,
      top_p,
      guided=guided,
      greedy=greedy,
      filtered=filtered,
    )
    return (token, caches), token

  return scan_positions(config, body, jnp.zeros(batch, jnp.int32), caches).T
