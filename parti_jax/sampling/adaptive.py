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

from parti_jax.models import token_decoder
from parti_jax.models.nn import attention
from parti_jax.models.nn import transformer
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


def confidence(logits):
  """The likeliest token's probability less that of the next one (CALM, section 3).

  CALM calls it the softmax response. The logits are taken as they are, whatever temperature the
  token is drawn with.

  Args:
    logits: float32 [..., codebook_size].

  Returns:
    float32 [...], from 0 to 1.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  first = jnp.argmax(probabilities, axis=-1, keepdims=True)
  # Not by top_k: it sorts, and gathers a codebook that is split over devices.
  codes = jax.lax.broadcasted_iota(jnp.int32, probabilities.shape, probabilities.ndim - 1)
  second = jnp.max(jnp.where(codes == first, 0.0, probabilities), axis=-1)
  return jnp.max(probabilities, axis=-1) - second


@flax.struct.dataclass
class Pass:
  """One position's pass through the decoder, from which rows leave at different layers.

  Attributes:
    x: [batch, 1, embed], the output of the last layer that each row passed.
    state: transformer.DecoderState with this position.
    passed: int32 [batch], the layers that each row passed.
    computed: int32 [], the layers that were computed.
    entries: for each layer this position's key and value, [batch, 1, heads, head_dim] each.
  """

  x: Any
  state: transformer.DecoderState
  passed: Any
  computed: Any
  entries: list[Any]


class AdaptiveDecoder:
  """Steps of a `token_decoder.TokenDecoder` that leave out layers.

  Args:
    config: PartiConfig.
    params: of `parameters.cut`.
  """

  def __init__(self, config, params):
    self._config = config
    self._layers = params['image_decoder']['decoder']['layers']
    self._apply = functools.partial(
      token_decoder.TokenDecoder(config).apply, {'params': params['image_decoder']}
    )
    self._block = transformer.DecoderBlock(
      config.width, config.mlp_width, config.heads, dtype=config.compute_dtype, parent=None
    )

  def logits(self, x):
    """Logits of any layer's output [batch, 1, embed]: float32 [batch, codebook_size]."""
    return self._apply(x, method=lambda model, x: model.predict(model.decoder.norm(x)))[:, 0]

  def until_confident(self, previous, state, threshold, rows: int = 1) -> Pass:
    """A pass whose rows leave after the first layer that predicts their token with confidence.

    Args:
      previous: int32 [batch], the tokens before this position.
      state: transformer.DecoderState.
      threshold: float32 [], the `confidence` from which on a row leaves; None for no row.
      rows: neighbouring rows that leave together, by the confidence of the first of them.
    """

    def leaves(layer, x, left):
      if threshold is None or layer == 0:
        return left
      sure = lambda x: jnp.repeat(confidence(self.logits(x[::rows])) >= threshold, rows)
      return left | jax.lax.cond(jnp.all(left), lambda x: jnp.ones_like(left), sure, x)

    return self._pass(previous, state, leaves)

  def after(self, other: Pass, previous, state, copied) -> Pass:
    """A pass without text after that with text, whose rows leave after the same layers.

    Args:
      other: the pass with text.
      previous: as `until_confident`.
      state: see `previous`.
      copied: bool [batch], rows that do without this pass. Their output means nothing; the caches
        get their keys and values from the other pass.
    """
    leaves = lambda layer, x, left: copied | (other.passed <= layer)
    return self._pass(previous, state, leaves, copied, other.entries)

  def _pass(self, previous, state, leaves, copied=None, entries=None) -> Pass:
    """One position through as many layers as its rows need.

    A row that has left keeps its hidden state, and the keys and values of the layers that it skips
    are made of that, so that later positions find the caches whole. Once all rows have left, nothing
    else of a layer is computed.

    Args:
      previous: as `until_confident`.
      state: see `previous`.
      leaves: (layers passed, x [batch, 1, embed], bool [batch] that have left) -> bool [batch] that
        have left now.
      copied: as `after`; None for no row.
      entries: keys and values for the copied rows, as in a Pass.
    """
    position = state.position
    x = self._apply(previous[:, None], position, method='embed')
    left = jnp.zeros(x.shape[:1], bool) if copied is None else copied
    passed, computed = jnp.zeros(x.shape[:1], jnp.int32), jnp.int32(0)
    caches, made = [], []
    for layer, params in enumerate(self._layers):
      left = leaves(layer, x, left)
      project = functools.partial(self._block.apply, {'params': params}, method='project')
      if copied is None:
        query, *entry = project(x)
      else:
        query, *entry = _project_unless(copied, project, x, entries[layer])
      # Written outside of the branches: one that returned the cache would return a copy.
      pattern = self._config.layer_pattern(layer)
      cache = attention.write_cache(state.caches[layer], *entry, position, pattern)

      def rest(x, query, cache, layer=layer, params=params, pattern=pattern):
        text = state.texts[layer], state.text_mask
        x, _ = self._block.apply(
          {'params': params}, x, *text, (pattern,), cache=cache, position=position, query=query
        )
        return x, jnp.int32(1)

      after, ran = jax.lax.cond(
        jnp.all(left), lambda x, *_: (x, jnp.int32(0)), rest, x, query, cache
      )
      x = jnp.where(left[:, None, None], x, after)
      passed, computed = passed + ~left, computed + ran
      caches.append(cache)
      made.append(tuple(entry))
    state = state.replace(position=position + 1, caches=caches)
    return Pass(x, decoding.in_cache_layout(state), passed, computed, made)


def _project_unless(copied, project, x, entry):
  """`project(x)`, with a given key and value for the rows that are copied."""
  query, *own = jax.lax.cond(
    jnp.all(copied), lambda x: (jnp.zeros_like(entry[0]), *entry), project, x
  )
  copied = copied[:, None, None, None]
  return query, *(jnp.where(copied, there, part) for there, part in zip(entry, own))


def _step_together(decoder, previous, state, scale, sampling):
  """A position with both passes as one batch, in which both rows of an image leave together."""
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


def _step_apart(decoder, previous, states, scale, sampling):
  """A position with one pass after the other, the second for the images that need it."""
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


def sample_tokens(config, params, text_tokens, keys, sampling: decoding.Sampling):
  """Draws the image tokens of a batch, as `decoding.sample_tokens` and with its arguments.

  `sampling.exit_threshold` is the `confidence` of the prediction with text from which on a token
  leaves, and `sampling.skip_threshold` that from which on, if guided, the pass without text is
  left out.

  Returns:
    int32 [batch, image_length] and a Usage.
  """
  sampling = sampling.at_each_position(config.image_length)
  decoder = AdaptiveDecoder(config, params)
  start = functools.partial(decoding.start, config, params)
  if sampling.guided and sampling.skip_threshold is not None:
    step_logits = _step_apart
    states = start(text_tokens), start(decoding.empty_text(*text_tokens.shape))
  else:
    step_logits = _step_together
    states = start(decoding.with_and_without(text_tokens) if sampling.guided else text_tokens)

  def step(carry, position):
    previous, states = carry
    scale = sampling.guidance_scale[position]
    logits, states, usage = step_logits(decoder, previous, states, scale, sampling)
    token = decoding.choose(logits, keys, position, sampling)
    return (token, states), (token, usage)

  tokens, usage = decoding.scan_positions(config, step, len(keys), states)
  computed = jnp.broadcast_to(usage.computed, (len(keys),) + usage.computed.shape)
  return tokens.T, Usage(usage.layers.T, usage.unguided.T, computed)
