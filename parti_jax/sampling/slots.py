"""The compiled programs of continuous batching: a batch whose rows are at positions of their own.

A row of the batch is called a slot. A prompt takes a free slot at any time: `insert` writes its text
into it, and its position starts at 0. Keys and values that an earlier picture left in the caches
need not be erased, since a position attends only to slots of the cache that a position before it
has written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import Key
from jaxtyping import PyTree
from jaxtyping import UInt8
from jaxtyping import UInt32

from parti_jax.core import numerics
from parti_jax.exported_model import sampling_settings
from parti_jax.models import generators
from parti_jax.models import pixels
from parti_jax.models.nn import transformer
from parti_jax.sampling import decoding

# Level of gray of what a preview doesn't show yet.
BLANK = np.uint8(224)


class Slots(flax.struct.PyTreeNode):
  """What a batch keeps on the devices between two calls.

  Attributes:
    state: the decoder's state, with two rows for each slot if guided; `Requests.position` stands in
      for its position.
    tokens: the image tokens so far; those from a slot's position on have no meaning.
  """

  state: transformer.DecoderState
  tokens: Int32[Array, 'slots image_length']


@flax.struct.dataclass
class Requests:
  """What each slot samples and how; `decoding.Sampling` with an entry for each slot.

  Attributes:
    seed: the seed of the picture.
    image_index: its index among the images of its seed.
    position: number of its tokens so far.
    guidance_scale: weight of guidance at each position.
    guided: whether guidance counts. Otherwise the logits are those with text.
    temperature: divides the logits; positive.
    greedy: whether to take the likeliest token instead of sampling.
    top_k: number of tokens to keep, 0 for all.
    top_p: probability to keep, 1 for all.
    kept: tokens that are taken over instead of sampled; -1 where a token is sampled.
  """

  seed: UInt32[Array | np.ndarray, 'slots']
  image_index: Int32[Array | np.ndarray, 'slots']
  position: Int32[Array | np.ndarray, 'slots']
  guidance_scale: Float32[Array | np.ndarray, 'slots image_length']
  guided: Bool[Array | np.ndarray, 'slots']
  temperature: Float32[Array | np.ndarray, 'slots']
  greedy: Bool[Array | np.ndarray, 'slots']
  top_k: Int32[Array | np.ndarray, 'slots']
  top_p: Float32[Array | np.ndarray, 'slots']
  kept: Int32[Array | np.ndarray, 'slots image_length']

  @classmethod
  def empty(cls, slots: int, length: int) -> Requests:
    """Returns NumPy arrays for `slots` slots and pictures of `length` image tokens."""
    return cls(
      seed=np.zeros(slots, np.uint32),
      image_index=np.zeros(slots, np.int32),
      position=np.zeros(slots, np.int32),
      guidance_scale=np.ones([slots, length], np.float32),
      guided=np.zeros(slots, bool),
      temperature=np.ones(slots, np.float32),
      greedy=np.ones(slots, bool),
      top_k=np.zeros(slots, np.int32),
      top_p=np.ones(slots, np.float32),
      kept=np.full([slots, length], -1, np.int32),
    )

  def set(
    self,
    slot: int,
    seed: int,
    image_index: int,
    settings: sampling_settings.SamplingSettings,
    kept: Int32[np.ndarray, 'image_length'] | None = None,
  ) -> None:
    """Begins a picture in a slot; the fields must be NumPy arrays, which change in place."""
    scales, temperature, top_k, top_p = settings.arrays(self.guidance_scale.shape[1])
    values = {
      'seed': seed,
      'image_index': image_index,
      'position': 0,
      'guidance_scale': scales,
      'guided': settings.guided,
      'temperature': 1.0 if settings.greedy else temperature,
      'greedy': settings.greedy,
      'top_k': 0 if settings.greedy else top_k,
      'top_p': 1.0 if settings.greedy else top_p,
      'kept': -1 if kept is None else kept,
    }
    for name, value in values.items():
      getattr(self, name)[slot] = value


def _constrained(slots: Slots) -> Slots:
  """Splits a batch over a mesh, in every program alike, so that none is compiled twice."""

  def constrain(leaf: Array, *names: str | None) -> Array:
    names = ('activation_batch', *names, None, None, None)[: leaf.ndim]
    return nn.with_logical_constraint(leaf, names)

  state = slots.state
  return Slots(
    state.replace(
      caches=jax.tree.map(lambda leaf: constrain(leaf, 'activation_heads'), state.caches),
      texts=jax.tree.map(lambda leaf: constrain(leaf, 'activation_heads'), state.texts),
      text_mask=constrain(state.text_mask),
      start=jax.tree.map(constrain, state.start),
    ),
    constrain(slots.tokens),
  )


def _init_state(config, params, texts, others, guided: bool, cache: str, length: int):
  """`decoding.init_state` for texts that become two rows each if guided."""
  rows = decoding.with_and_without(config, texts, others) if guided else texts
  return decoding.init_state(config, params, rows, length, cache)


@functools.partial(jax.jit, static_argnames=('config', 'guided', 'cache'))
def begin(
  params: dict[str, Any],
  texts: Int32[Array, 'slots text_length'],
  *,
  config: generators.Config,
  guided: bool,
  cache: str,
) -> Slots:
  """Returns a batch without pictures.

  Args:
    params: the result of `parameters.for_sampling`.
    texts: zeros, of the texts' shape.
    config: sizes of the generator.
    guided: whether the batch can compute logits without text too.
    cache: how to hold keys and values, a name in `sampling_settings.CACHES`.
  """
  state = _init_state(config, params, texts, None, guided, cache, config.image_length)
  tokens = jnp.zeros((len(texts), config.image_length), jnp.int32)
  return _constrained(Slots(state, tokens))


@functools.partial(jax.jit, static_argnames=('config', 'guided', 'cache'))
def encode(
  params: dict[str, Any],
  texts: Int32[Array, 'texts text_length'],
  others: Int32[Array, 'texts text_length'],
  *,
  config: generators.Config,
  guided: bool,
  cache: str,
) -> dict[str, Any]:
  """Encodes texts for `insert`, with two rows for each text if guided.

  Args:
    params: the result of `parameters.for_sampling`.
    texts: tokens of the prompts, padded with 0.
    others: those of guidance's other side; a row of -1 stands for the empty text.
    config: sizes of the generator.
    guided: an argument of `begin`.
    cache: an argument of `begin`.

  Returns:
    Fields of the decoder's state: `DecoderState.of_texts`.
  """
  # The caches are left out: a single position makes them small, if the compiler keeps them at all.
  others = jnp.where(others < 0, generators.empty_text(config, texts), others)
  return _init_state(config, params, texts, others, guided, cache, 1).of_texts


@functools.partial(jax.jit, donate_argnames='slots')
def insert(places: Int32[Array, 'texts'], slots: Slots, encoded: dict[str, Any]) -> Slots:
  """Writes texts into slots.

  Args:
    places: the slot of each text; a number from the number of slots on writes nothing.
    slots: the batch; its memory is reused.
    encoded: a result of `encode`.
  """
  each = len(encoded['text_mask']) // len(places)
  rows = (each * places[:, None] + jnp.arange(each)).reshape(-1)
  write = lambda whole, new: whole.at[rows].set(new, mode='drop')
  state = slots.state.replace(**jax.tree.map(write, slots.state.of_texts, encoded))
  return _constrained(slots.replace(state=state))


@functools.partial(jax.jit, static_argnames=('config', 'guided', 'count'), donate_argnames='slots')
def advance(
  params: dict[str, Any],
  requests: Requests,
  slots: Slots,
  *,
  config: generators.Config,
  guided: bool,
  count: int,
) -> tuple[Slots, Int32[Array, '']]:
  """Samples the next tokens of all slots.

  Args:
    params: the result of `parameters.for_sampling`.
    requests: what each slot samples.
    slots: the batch; its memory is reused.
    config: sizes of the generator.
    guided: an argument of `begin`.
    count: number of tokens of each slot. No position may exceed the image length minus this number.

  Returns:
    The batch, and a number that is there once the batch is.
  """
  keys = jax.vmap(lambda seed, index: jax.random.fold_in(numerics.key(seed), index))(
    requests.seed, requests.image_index
  )
  each = 2 if guided else 1
  rows = jnp.repeat(requests.position, each)
  before = jnp.maximum(requests.position - 1, 0)
  previous = jnp.take_along_axis(slots.tokens, before[:, None], axis=1)[:, 0]
  apply: Callable[..., Any] = generators.decoder(config).apply

  def step(carry, ahead):
    previous, state = carry
    inputs = jnp.repeat(previous, each)[:, None]
    logits, state = apply({'params': params['image_decoder']}, inputs, state=state)
    position = requests.position + ahead
    logits = _guided(logits[:, 0], position, requests) if guided else logits[:, 0]
    token = choose(logits, keys, position, requests)
    kept = jnp.take_along_axis(jnp.asarray(requests.kept), position[:, None], axis=1)[:, 0]
    token = jnp.where(kept < 0, token, kept)
    return (token, decoding.in_cache_layout(state)), token

  carry = previous, slots.state.replace(position=rows)
  (_, state), tokens = jax.lax.scan(step, carry, jnp.arange(count))
  write = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0)
  tokens = jax.vmap(write)(slots.tokens, tokens.T, requests.position)
  state = state.replace(position=slots.state.position)
  return _constrained(Slots(state, tokens)), tokens[0, 0]


def _guided(
  logits: Float32[Array, 'rows codebook'], position: Int32[Array, 'slots'], requests: Requests
) -> Float32[Array, 'slots codebook']:
  """Applies guidance where a request asks for it."""
  scale = jnp.take_along_axis(jnp.asarray(requests.guidance_scale), position[:, None], axis=1)
  return jnp.where(
    jnp.asarray(requests.guided)[:, None], decoding.guide(logits, scale), logits[::2]
  )


def choose(
  logits: Float32[Array, 'slots codebook'],
  keys: Key[Array, 'slots'],
  position: Int32[Array, 'slots'],
  requests: Requests,
) -> Int32[Array, 'slots']:
  """Samples one token for each slot, like `decoding.choose` with the slot's own settings.

  Args:
    logits: the logits of each slot.
    keys: the key of each slot's picture.
    position: the position of each slot's token.
    requests: what each slot samples.
  """
  top_k, top_p = jnp.asarray(requests.top_k), jnp.asarray(requests.top_p)
  scaled = logits / jnp.asarray(requests.temperature)[:, None]
  # Both filters sum over the codebook many times, so they run only while a slot needs them.
  scaled = jax.lax.cond(
    jnp.any((top_k > 0) | (top_p < 1.0)),
    lambda scaled: jax.vmap(decoding.filter_logits)(scaled, top_k, top_p),
    lambda scaled: scaled,
    scaled,
  )
  noise = decoding.gumbel_noise(keys, position, logits.shape[-1])
  sampled, likeliest = decoding.likeliest(scaled + noise), decoding.likeliest(logits)
  return jnp.where(jnp.asarray(requests.greedy), likeliest, sampled)


@functools.partial(jax.jit, static_argnames='tokenizer')
def detokenize(
  params: PyTree,
  places: Int32[Array, 'pictures'],
  tokens: Int32[Array, 'slots image_length'],
  *,
  tokenizer: nn.Module,
) -> tuple[Int32[Array, 'pictures image_length'], UInt8[Array, 'pictures height width 3']]:
  """Decodes the pictures in some slots.

  Args:
    params: parameters of the image tokenizer.
    places: the slots.
    tokens: the tokens of all slots.
    tokenizer: the image tokenizer.

  Returns:
    The tokens of these pictures, and their pixels.
  """
  chosen = nn.with_logical_constraint(tokens[places], ('activation_batch', None))
  apply: Callable[..., Any] = tokenizer.apply
  return chosen, pixels.to_bytes(apply({'params': params}, chosen, method='detokenize'))


@functools.partial(jax.jit, static_argnames=('tokenizer', 'grid'))
def preview(
  params: PyTree,
  places: Int32[Array, 'pictures'],
  rows: Int32[Array, 'pictures'],
  tokens: Int32[Array, 'slots image_length'],
  kept: Int32[Array, 'pictures image_length'] | None = None,
  *,
  tokenizer: nn.Module,
  grid: tuple[int, int],
) -> UInt8[Array, 'pictures height width 3']:
  """Decodes the first rows of pictures that are not complete yet, and the tokens that they keep.

  Decoders of image tokens need all of them, so the last row that is there stands for those below it,
  and what is decoded from these is blank.

  Args:
    params: parameters of the image tokenizer.
    places: the slots.
    rows: number of rows of tokens that are there, at least 1.
    tokens: the tokens of all slots.
    kept: what `Requests.kept` has for these pictures; None if they keep nothing.
    tokenizer: the image tokenizer.
    grid: rows and columns of image tokens.
  """
  row = jnp.minimum(jnp.arange(grid[0]), rows[:, None] - 1)
  squares = tokens[places].reshape(-1, *grid)
  filled = jnp.take_along_axis(squares, row[:, :, None], axis=1).reshape(len(places), -1)
  there = jnp.broadcast_to((jnp.arange(grid[0]) < rows[:, None])[:, :, None], squares.shape)
  if kept is not None:
    filled = jnp.where(kept < 0, filled, kept)
    there |= (kept >= 0).reshape(squares.shape)
  filled = nn.with_logical_constraint(filled, ('activation_batch', None))
  apply: Callable[..., Any] = tokenizer.apply
  images = pixels.to_bytes(apply({'params': params}, filled, method='detokenize'))
  line, column = (jnp.arange(side) * count // side for side, count in zip(images.shape[1:3], grid))
  return jnp.where(there[:, line][:, :, column, None], images, BLANK)
