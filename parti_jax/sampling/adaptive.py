"""The decoding loop that computes less for easy tokens: early exit, and skipping guidance's pass.

With early exit, as in Confident Adaptive Language Modeling (CALM, arXiv 2207.07061), a token exits
after the first decoder layer that predicts it, from the text, with enough confidence. The layers
that it skips take their keys and values from its last hidden state (section 3). Guidance's pass
without text is skipped for tokens that the pass with text predicts with enough confidence; the
cache of the pass without text then gets the keys and values of the pass with text, so that later
tokens find no gap.

Both are decided for each image, so a picture doesn't depend on its batch. `jax.lax.cond` leaves out
the layers and passes that no image of the batch needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import Key

from parti_jax.models import generators
from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import transformer
from parti_jax.sampling import decoding


class Usage(flax.struct.PyTreeNode):
  """What the tokens of a batch computed.

  Attributes:
    layers: number of decoder layers that each token passed.
    unguided: whether guidance's pass without text was skipped for each token; False without
      guidance.
    computed: number of decoder layers computed for the batch at each position, with text and
      without; equal for all images of a batch.
  """

  layers: Int32[Array | np.ndarray, '*images image_length']
  unguided: Bool[Array | np.ndarray, '*images image_length']
  computed: Int32[Array | np.ndarray, '*images image_length 2']

  def summary(self, decoder_layers: int) -> str:
    """Returns a line with the means over all tokens; the fields must be NumPy arrays."""
    with_text, without = self.computed[..., 0].mean(), self.computed[..., 1].mean()
    return (
      f'{self.layers.mean():.2f} of {decoder_layers} layers per token (computed for its batch: '
      f'{with_text:.2f}); the pass without text skipped for {100 * self.unguided.mean():.0f}% '
      f'of the tokens (layers of it computed: {without:.2f})'
    )


def confidence(logits: Float32[Array, '*places codebook']) -> Float32[Array, '*places']:
  """Returns the probability of the likeliest token minus that of the second (CALM, section 3).

  CALM calls it the softmax response. It ranges from 0 to 1 and ignores the sampling temperature.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  first = jnp.argmax(probabilities, axis=-1, keepdims=True)
  # top_k would sort, and gather a codebook that is split over devices.
  codes = jax.lax.broadcasted_iota(jnp.int32, probabilities.shape, probabilities.ndim - 1)
  second = jnp.max(jnp.where(codes == first, 0.0, probabilities), axis=-1)
  return jnp.max(probabilities, axis=-1) - second


class Pass(flax.struct.PyTreeNode):
  """The result of one pass through the decoder, from which tokens exit at some layer.

  While a pass runs, it is the result of the layers until then.

  Attributes:
    x: output of the last layer that each token passed.
    state: the decoder's state after this position; unchanged by a pass that looks ahead.
    passed: number of layers that each token passed.
    computed: number of layers that were computed.
    entries: key and value of each position in each layer.
  """

  x: Float[Array, 'batch length embed']
  state: transformer.DecoderState
  passed: Int32[Array, 'batch length']
  computed: Int32[Array, '']
  entries: list[transformer.Entry]


# Query, key and value of some positions in one layer's self-attention.
_Projected = tuple[
  Float[Array, 'batch length heads head_dim'],
  Float[Array, 'batch length kv_heads head_dim'],
  Float[Array, 'batch length kv_heads head_dim'],
]


class AdaptiveDecoder:
  """Passes of an image-token decoder that skip layers.

  A token that has exited keeps its hidden state, from which the layers that it skips compute their
  keys and values, so that the caches have no gap for later positions. Once all tokens have exited,
  nothing else of a layer is computed.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    look_ahead: whether a pass looks ahead, like `Decoder.look_ahead`, at any number of positions of
      each row. Otherwise it decodes a single position, the same in all rows.
  """

  def __init__(self, config: generators.Config, params: dict[str, Any], look_ahead: bool = False):
    self._config = config
    self._look_ahead = look_ahead
    self._layers = params['image_decoder']['decoder']['layers']
    self._apply: Callable[..., Any] = functools.partial(
      generators.decoder(config).apply, {'params': params['image_decoder']}
    )
    self._apply_block: Callable[..., Any] = generators.block(config).apply

  def logits(
    self, x: Float[Array, 'batch length embed']
  ) -> Float32[Array, 'batch length codebook']:
    """Returns the logits that a layer's output predicts."""
    return self._apply(x, method='layer_logits')

  def until_confident(
    self,
    previous: Int32[Array, 'batch length'],
    state: transformer.DecoderState,
    threshold: Float[ArrayLike, ''] | None,
    rows: int = 1,
  ) -> Pass:
    """Runs a pass whose tokens exit after the first layer that predicts them confidently.

    Args:
      previous: the token before each position.
      state: the decoder's state before these positions.
      threshold: the least `confidence` with which a token exits; None disables early exit.
      rows: number of adjacent rows that exit together, when the first of them is confident.
    """
    done = self._begin(previous, state)
    exited = jnp.zeros(previous.shape, bool)
    for layer in range(len(self._layers)):
      if threshold is not None and layer > 0:
        exited = exited | self._confident(done.x, exited, threshold, rows)
      done = self._layer(layer, done, exited, self._project(layer, done.x, state))
    return self._end(done)

  def _confident(
    self,
    x: Float[Array, 'batch length embed'],
    exited: Bool[Array, 'batch length'],
    threshold: Float[ArrayLike, ''],
    rows: int,
  ) -> Bool[Array, 'batch length']:
    """Returns which tokens a layer's output predicts confidently.

    Once all tokens have exited, it is True for all and costs nothing.

    Args:
      x: output of the layer.
      exited: which tokens have exited before.
      threshold: an argument of `until_confident`.
      rows: an argument of `until_confident`.
    """
    sure = lambda x: jnp.repeat(confidence(self.logits(x[::rows])) >= threshold, rows, axis=0)
    return jax.lax.cond(jnp.all(exited), lambda x: jnp.ones_like(exited), sure, x)

  def after(
    self,
    other: Pass,
    previous: Int32[Array, 'batch length'],
    state: transformer.DecoderState,
    copied: Bool[Array, 'batch length'],
  ) -> Pass:
    """Runs the pass without text after the pass with text; tokens exit after the same layers.

    Args:
      other: the pass with text.
      previous: the token before each position.
      state: the state of the decoder without text before these positions.
      copied: tokens that skip this pass. Their output is meaningless; the caches get their keys and
        values from the other pass.
    """
    done = self._begin(previous, state)
    for layer in range(len(self._layers)):
      exited = copied | (other.passed <= layer)
      project = functools.partial(self._project, layer, state=state)
      projected = _project_unless(copied, project, done.x, other.entries[layer], self._config.heads)
      done = self._layer(layer, done, exited, projected)
    return self._end(done)

  def _begin(self, previous: Int32[Array, 'batch length'], state: transformer.DecoderState) -> Pass:
    """Returns the pass before the first layer.

    Args:
      previous: the token before each position.
      state: the decoder's state before these positions.
    """
    # A state to look ahead from has a position for each row.
    assert self._look_ahead == bool(state.position.ndim)
    x = self._apply(previous, state, method='next_inputs')
    return Pass(x, state, jnp.zeros(previous.shape, jnp.int32), jnp.int32(0), [])

  def _project(
    self, layer: int, x: Float[Array, 'batch length embed'], state: transformer.DecoderState
  ) -> _Projected:
    """Returns query, key and value of a layer for its input x."""
    params = {'params': self._layers[layer]}
    return self._apply_block(params, x, position=state.position, method='project')

  def _layer(
    self, layer: int, before: Pass, exited: Bool[Array, 'batch length'], projected: _Projected
  ) -> Pass:
    """Runs a layer for the tokens that haven't exited.

    Args:
      layer: index of the layer.
      before: the pass until this layer.
      exited: which tokens have exited before this layer.
      projected: query, key and value of the layer.
    """
    params, pattern = {'params': self._layers[layer]}, generators.layer_pattern(self._config, layer)
    (query, key, value), state = projected, before.state
    cache, position = state.caches[layer], state.position
    if not self._look_ahead:
      # Outside of the branches: a branch that returned the cache would return a copy.
      cache = attention_cache.write_cache(cache, key, value, position, pattern)
      caches = [*state.caches[:layer], cache, *state.caches[layer + 1 :]]
      state = state.replace(caches=caches)

    def decode(x, query, cache, entry):
      inputs = x, state.texts[layer], state.text_mask, cache, position, pattern, query
      if self._look_ahead:
        x = self._apply_block(params, *inputs, entry, method='decode_ahead')
      else:
        x = self._apply_block(params, *inputs, method='decode_from_cache')
      return x, jnp.int32(1)

    skip = lambda x, *_: (x, jnp.int32(0))
    x, ran = jax.lax.cond(jnp.all(exited), skip, decode, before.x, query, cache, (key, value))
    return Pass(
      jnp.where(exited[..., None], before.x, x),
      state,
      before.passed + ~exited,
      before.computed + ran,
      [*before.entries, (key, value)],
    )

  def _end(self, done: Pass) -> Pass:
    """Returns the pass after the last layer."""
    if self._look_ahead:
      return done
    state = done.state.replace(position=done.state.position + 1)
    return done.replace(state=decoding.in_cache_layout(state))


def _project_unless(
  copied: Bool[Array, 'batch length'],
  project: Callable[..., Any],
  x: Float[Array, 'batch length embed'],
  entry: transformer.Entry,
  heads: int,
) -> _Projected:
  """Returns `project(x)`, but with the key and value of `entry` for the tokens in `copied`."""
  key = entry[0]
  no_query = lambda: jnp.zeros(key.shape[:2] + (heads,) + key.shape[3:], key.dtype)
  query, *own = jax.lax.cond(jnp.all(copied), lambda x: (no_query(), *entry), project, x)
  copied = copied[..., None, None]
  return query, *(jnp.where(copied, there, part) for there, part in zip(entry, own))


def init_states(
  config: generators.Config,
  params: dict[str, Any],
  text_tokens: Int32[Array, 'batch text_length'],
  sampling: decoding.Sampling,
  length: int | None = None,
) -> tuple[transformer.DecoderState, ...]:
  """Returns the states before the first token, for `step_logits`.

  There are two, with text and without, if `sampling` may skip the pass without text. Otherwise
  there is one, with two rows for each image if guided.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    text_tokens: tokens of the prompts, padded with 0.
    sampling: how to sample.
    length: an argument of `decoding.init_state`.
  """
  init_state = functools.partial(
    decoding.init_state, config, params, length=length, cache=sampling.cache
  )
  if not sampling.guided:
    return (init_state(text_tokens),)
  if sampling.skip_threshold is None:
    return (init_state(decoding.with_and_without(config, text_tokens)),)
  return init_state(text_tokens), init_state(generators.empty_text(config, text_tokens))


def step_logits(
  decoder: AdaptiveDecoder,
  previous: Int32[Array, 'batch length'],
  states: tuple[transformer.DecoderState, ...],
  scale: Float32[Array, ''] | Float32[Array, 'batch length 1'],
  sampling: decoding.Sampling,
) -> tuple[Float32[Array, 'batch length codebook'], tuple[Pass, ...], Usage]:
  """Runs positions with and without text.

  Args:
    decoder: the decoder.
    previous: the token before each position.
    states: the result of `init_states` or of the previous passes.
    scale: weight of guidance, at all positions or at each.
    sampling: how to sample.

  Returns:
    The guided logits, a pass for each state, and what the positions computed, with [2] numbers of
    layers as `computed`.
  """
  step = _step_together if len(states) == 1 else _step_apart
  return step(decoder, previous, states, scale, sampling)


def _step_together(decoder, previous, states, scale, sampling):
  """`step_logits` with both passes as one batch, in which an image's two rows exit together."""
  rows = 2 if sampling.guided else 1
  done = decoder.until_confident(
    jnp.repeat(previous, rows, axis=0), *states, sampling.exit_threshold, rows
  )
  logits = decoder.logits(done.x)
  if sampling.guided:
    logits = decoding.guide(logits, scale)
  usage = Usage(
    done.passed[::rows],
    jnp.zeros(previous.shape, bool),
    jnp.stack([done.computed, done.computed * (rows - 1)]),
  )
  return logits, (done,), usage


def _step_apart(decoder, previous, states, scale, sampling):
  """`step_logits` with one pass after the other, the second for the tokens that need it."""
  done = decoder.until_confident(previous, states[0], sampling.exit_threshold)
  logits = decoder.logits(done.x)
  skipped = confidence(logits) >= sampling.skip_threshold
  other = decoder.after(done, previous, states[1], skipped)
  without = jax.lax.cond(
    jnp.all(skipped), lambda x: jnp.zeros_like(logits), decoder.logits, other.x
  )
  both = jnp.stack([logits, without], axis=1).reshape(-1, *logits.shape[1:])
  logits = jnp.where(skipped[..., None], logits, decoding.guide(both, scale))
  usage = Usage(done.passed, skipped, jnp.stack([done.computed, other.computed]))
  return logits, (done, other), usage


def sample_tokens(
  config: generators.Config,
  params: dict[str, Any],
  text_tokens: Int32[Array, 'batch text_length'],
  keys: Key[Array, 'batch'],
  sampling: decoding.Sampling,
) -> tuple[Int32[Array, 'batch image_length'], Usage]:
  """Samples the image tokens of a batch like `decoding.sample_tokens`, but skips what it can.

  A token exits when the `confidence` of the prediction with text reaches
  `sampling.exit_threshold`. If guided, it skips the pass without text when that confidence, after
  its last layer, reaches `sampling.skip_threshold`.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    text_tokens: tokens of the prompts, padded with 0.
    keys: the result of `decoding.image_keys`.
    sampling: how to sample.

  Returns:
    The image tokens, and what they computed.
  """
  sampling = sampling.at_each_position(config.image_length)
  decoder = AdaptiveDecoder(config, params)

  def step(carry, position):
    previous, states = carry
    scale = jnp.asarray(sampling.guidance_scale)[position]
    logits, passes, usage = step_logits(decoder, previous[:, None], states, scale, sampling)
    token = decoding.choose(logits[:, 0], keys, position, sampling)
    usage = usage.replace(layers=usage.layers[:, 0], unguided=usage.unguided[:, 0])
    return (token, tuple(done.state for done in passes)), (token, usage)

  states = init_states(config, params, text_tokens, sampling)
  tokens, usage = decoding.scan_positions(config, step, len(keys), states)
  computed = jnp.broadcast_to(usage.computed, (len(keys),) + usage.computed.shape)
  return tokens.T, Usage(usage.layers.T, usage.unguided.T, computed)
