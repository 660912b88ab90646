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

from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models import token_decoder
from parti_jax.models.nn import attention
from parti_jax.models.nn import transformer
from parti_jax.sampling import decoding


@flax.struct.dataclass
class Usage:
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


@flax.struct.dataclass
class Pass:
  """The result of one position's pass through the decoder, from which rows exit at some layer.

  Attributes:
    x: output of the last layer that each row passed.
    state: the decoder's state after this position.
    passed: number of layers that each row passed.
    computed: number of layers that were computed.
    entries: key and value of this position in each layer.
  """

  x: Float[Array, 'batch 1 embed']
  state: transformer.DecoderState
  passed: Int32[Array, 'batch']
  computed: Int32[Array, '']
  entries: list[
    tuple[Float[Array, 'batch 1 heads head_dim'], Float[Array, 'batch 1 heads head_dim']]
  ]


class AdaptiveDecoder:
  """Steps of a `token_decoder.TokenDecoder` that skip layers.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
  """

  def __init__(self, config: parti_config.PartiConfig, params: dict[str, Any]):
    self._config = config
    self._layers = params['image_decoder']['decoder']['layers']
    self._apply: Callable[..., Any] = functools.partial(
      token_decoder.TokenDecoder(config).apply, {'params': params['image_decoder']}
    )
    block = transformer.DecoderBlock(
      config.width, config.mlp_width, config.heads, dtype=config.compute_dtype, parent=None
    )
    self._apply_block: Callable[..., Any] = block.apply

  def logits(self, x: Float[Array, 'batch 1 embed']) -> Float32[Array, 'batch codebook']:
    """Returns the logits that a layer's output predicts."""
    return self._apply(x, method=lambda model, x: model.logits_from(model.decoder.norm(x)))[:, 0]

  def until_confident(
    self,
    previous: Int32[Array, 'batch'],
    state: transformer.DecoderState,
    threshold: Float[ArrayLike, ''] | None,
    rows: int = 1,
  ) -> Pass:
    """Runs a pass whose rows exit after the first layer that predicts their token confidently.

    Args:
      previous: the tokens before this position.
      state: the decoder's state before this position.
      threshold: the least `confidence` with which a row exits; None disables early exit.
      rows: number of adjacent rows that exit together, when the first of them is confident.
    """

    def exits(layer, x, exited):
      if threshold is None or layer == 0:
        return exited
      sure = lambda x: jnp.repeat(confidence(self.logits(x[::rows])) >= threshold, rows)
      return exited | jax.lax.cond(jnp.all(exited), lambda x: jnp.ones_like(exited), sure, x)

    return self._pass(previous, state, exits)

  def after(
    self,
    other: Pass,
    previous: Int32[Array, 'batch'],
    state: transformer.DecoderState,
    copied: Bool[Array, 'batch'],
  ) -> Pass:
    """Runs the pass without text after the pass with text; rows exit after the same layers.

    Args:
      other: the pass with text.
      previous: the tokens before this position.
      state: the state of the decoder without text before this position.
      copied: rows that skip this pass. Their output is meaningless; the caches get their keys and
        values from the other pass.
    """
    exits = lambda layer, x, exited: copied | (other.passed <= layer)
    return self._pass(previous, state, exits, copied, other.entries)

  def _pass(
    self,
    previous: Int32[Array, 'batch'],
    state: transformer.DecoderState,
    exits: Callable[..., Any],
    copied: Bool[Array, 'batch'] | None = None,
    entries: list | None = None,
  ) -> Pass:
    """Runs one position through as many layers as its rows need.

    A row that has exited keeps its hidden state, from which the layers that it skips compute their
    keys and values, so that the caches have no gap for later positions. Once all rows have exited,
    nothing else of a layer is computed.

    Args:
      previous: the tokens before this position.
      state: the decoder's state before this position.
      exits: maps the number of layers passed, their output, and the rows that have exited, bool
        [batch], to the rows that have exited now.
      copied: rows that take their keys and values from `entries`; None for none.
      entries: the field of that name of another pass.
    """
    position = state.position
    x = self._apply(previous[:, None], position, method='embed')
    exited = jnp.zeros(x.shape[:1], bool) if copied is None else copied
    passed, computed = jnp.zeros(x.shape[:1], jnp.int32), jnp.int32(0)
    caches, made = [], []
    for layer, params in enumerate(self._layers):
      exited = exits(layer, x, exited)
      project = functools.partial(self._apply_block, {'params': params}, method='project')
      if copied is None or entries is None:
        query, key, value = project(x)
      else:
        query, key, value = _project_unless(copied, project, x, entries[layer])
      # Outside of the branches: a branch that returned the cache would return a copy.
      pattern = self._config.layer_pattern(layer)
      cache = attention.write_cache(state.caches[layer], key, value, position, pattern)

      def rest(x, query, cache, layer=layer, params=params, pattern=pattern):
        text = state.texts[layer], state.text_mask
        x = self._apply_block(
          {'params': params}, x, *text, cache, position, pattern, query, method='decode_from_cache'
        )
        return x, jnp.int32(1)

      after, ran = jax.lax.cond(
        jnp.all(exited), lambda x, *_: (x, jnp.int32(0)), rest, x, query, cache
      )
      x = jnp.where(exited[:, None, None], x, after)
      passed, computed = passed + ~exited, computed + ran
      caches.append(cache)
      made.append((key, value))
    state = state.replace(position=position + 1, caches=caches)
    return Pass(x, decoding.in_cache_layout(state), passed, computed, made)


def _project_unless(
  copied: Bool[Array, 'batch'], project: Callable[..., Any], x: Float[Array, 'batch 1 embed'], entry
):
  """Returns `project(x)`, but with the key and value of `entry` for the rows in `copied`."""
  query, *own = jax.lax.cond(
    jnp.all(copied), lambda x: (jnp.zeros_like(entry[0]), *entry), project, x
  )
  copied = copied[:, None, None, None]
  return query, *(jnp.where(copied, there, part) for there, part in zip(entry, own))


def _step_together(
  decoder: AdaptiveDecoder,
  previous: Int32[Array, 'batch'],
  state: transformer.DecoderState,
  scale: Float32[Array, ''],
  sampling: decoding.Sampling,
):
  """Runs a position with both passes as one batch, in which the two rows of an image exit together.

  Returns:
    The logits, float32 [batch, codebook], the next state, and the Usage of the position.
  """
  rows = 2 if sampling.guided else 1
  done = decoder.until_confident(jnp.repeat(previous, rows), state, sampling.exit_threshold, rows)
  logits = decoder.logits(done.x)
  if sampling.guided:
    logits = decoding.guide(logits, scale)
  usage = Usage(
    done.passed[::rows],
    jnp.zeros(previous.shape, bool),
    jnp.stack([done.computed, done.computed * (rows - 1)]),
  )
  return logits, done.state, usage


def _step_apart(
  decoder: AdaptiveDecoder,
  previous: Int32[Array, 'batch'],
  states: tuple[transformer.DecoderState, transformer.DecoderState],
  scale: Float32[Array, ''],
  sampling: decoding.Sampling,
):
  """Runs a position with one pass after the other, the second for the images that need it.

  Returns:
    As `_step_together`, with the states of both passes.
  """
  assert sampling.skip_threshold is not None
  done = decoder.until_confident(previous, states[0], sampling.exit_threshold)
  logits = decoder.logits(done.x)
  skipped = confidence(logits) >= sampling.skip_threshold
  other = decoder.after(done, previous, states[1], skipped)
  without = jax.lax.cond(
    jnp.all(skipped), lambda x: jnp.zeros_like(logits), decoder.logits, other.x
  )
  both = jnp.stack([logits, without], axis=1).reshape(-1, logits.shape[-1])
  logits = jnp.where(skipped[:, None], logits, decoding.guide(both, scale))
  usage = Usage(done.passed, skipped, jnp.stack([done.computed, other.computed]))
  return logits, (done.state, other.state), usage


def sample_tokens(
  config: parti_config.PartiConfig,
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
  init_state = functools.partial(decoding.init_state, config, params)
  step_logits: Callable[..., Any]
  states: Any
  if sampling.guided and sampling.skip_threshold is not None:
    step_logits = _step_apart
    empty = text_encoders.empty_text(config, text_tokens)
    states = init_state(text_tokens), init_state(empty)
  else:
    step_logits = _step_together
    states = init_state(
      decoding.with_and_without(config, text_tokens) if sampling.guided else text_tokens
    )

  def step(carry, position):
    previous, states = carry
    scale = jnp.asarray(sampling.guidance_scale)[position]
    logits, states, usage = step_logits(decoder, previous, states, scale, sampling)
    token = decoding.choose(logits, keys, position, sampling)
    return (token, states), (token, usage)

  tokens, usage = decoding.scan_positions(config, step, len(keys), states)
  computed = jnp.broadcast_to(usage.computed, (len(keys),) + usage.computed.shape)
  return tokens.T, Usage(usage.layers.T, usage.unguided.T, computed)
