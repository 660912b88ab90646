"""The decoding loop that checks several drafted tokens at once: speculative Jacobi decoding.

It follows Teng et al. (arXiv 2410.01699) and needs no second network. One pass of the decoder
computes the distributions of all tokens in a window. Each token of the window is a draft, sampled
from the distribution that the previous pass computed for its position, after drafts before it that
may since have changed. From left to right, a draft x is accepted with probability
min(1, p(x) / q(x)), where p is the distribution from this pass and q the one x was sampled from.
The first draft that is rejected is replaced by a sample from max(0, p − q), normalized, and the
later ones are sampled again, from the distributions of this pass. The window then moves on to the
first position without an accepted token. A token is thus a sample from p, as in `decoding`, and a
pass accepts at least one.

All noise belongs to a position of an image, not to a pass, so a picture doesn't depend on its
batch. A position gets its token the first time that it is tested, and drafts depend on no noise of
later positions. Drafts may therefore use the same noise in every pass: they still follow q given
everything that p and q depend on. They change less from pass to pass than with fresh noise, which
the paper uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import Key

from parti_jax.models import generators
from parti_jax.models.nn import transformer
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding


@flax.struct.dataclass
class Passes:
  """How many passes of the decoder pictures took.

  Attributes:
    needed: number of passes until all tokens of a picture were accepted.
    computed: number of passes computed for the batch of a picture.
  """

  needed: Int32[Array | np.ndarray, '*images']
  computed: Int32[Array | np.ndarray, '*images']

  def summary(self, image_length: int) -> str:
    """Returns a line with the means over all pictures; the fields must be NumPy arrays.

    Args:
      image_length: number of tokens of a picture.
    """
    accepted = image_length * self.needed.size / self.needed.sum()
    return (
      f'{self.needed.mean():.1f} decoder passes per picture of {image_length} tokens (computed for '
      f'its batch: {self.computed.mean():.1f}); {accepted:.2f} tokens accepted per pass'
    )


# A pass, for an image of 12 tokens with a window of 4, of which 5 tokens are accepted. `tokens` has a
# zero before the first token, so the token of a position is at the place after it (`_place`). a is an
# accepted token, d a draft, and '.' has no meaning yet.
#
#   place       0  1  2  3  4  5  6  7  8  9 10 11 12 13 ... 16
#   position       0  1  2  3  4  5  6  7  8  9 10 11 12 ... 15
#   tokens      0  a  a  a  a  a  d  d  d  d  .  .  .  .      .    start = 5
#                              └────────┘                          what the pass reads
#                                 └────────┘                       what it computes, and what it checks
#
# The pass reads the token before each position of the window. Let it accept the drafts of positions
# 5 and 6 and replace the one of 7. Then the next window starts at position 8:
#
#   tokens      0  a  a  a  a  a  a  a  a  d  d  d  d  .      .    start = 8
#                                          └────────┘
#
# The draft of position 8 is sampled from what the pass has computed for it. Those of 9 to 11 are at
# new positions, which no pass has computed: `first_new` is 9, where the window of the pass ended.
# Once all tokens are accepted, a window may start at 12 and end at 15.
@flax.struct.dataclass
class _Progress:
  """Carry of the loop.

  Attributes:
    tokens: a zero in place of the token before the first, then the accepted tokens, and after them
      the drafts of the window; see the drawing above.
    start: first position of each image's window, which is its number of accepted tokens.
    states: the decoder's states after the accepted tokens.
    proposals: logits of the distributions that the drafts were sampled from; None if the rule needs
      none.
    passes: number of passes of each image.
    computed: number of passes of the batch.
    usage: what each token computed, with places as in `tokens` but without the first; None unless
      a threshold is set.
  """

  tokens: Int32[Array, 'batch places']
  start: Int32[Array, 'batch']
  states: tuple[transformer.DecoderState, ...]
  proposals: Float32[Array, 'batch window codebook'] | None
  passes: Int32[Array, 'batch']
  computed: Int32[Array, '']
  usage: adaptive.Usage | None


def _place(position: Any) -> Any:
  """Returns the place of a position's token in `_Progress.tokens`."""
  return position + 1


def _read(whole: Array, start: Int32[Array, 'batch'], size: int) -> Array:
  """Returns `size` places of each row, from `start` on."""
  return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(whole, start)


def _write(whole: Array, part: Array, start: Int32[Array, 'batch']) -> Array:
  """Writes `part` to places of each row, from `start` on."""
  write = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0)
  return jax.vmap(write)(whole, part, start)


def _only(
  tokens: Int32[Array, '*places'], codebook_size: int
) -> Float32[Array, '*places {codebook_size}']:
  """Returns logits of the distributions that have only these tokens."""
  return jnp.where(jnp.arange(codebook_size) == tokens[..., None], 0.0, -jnp.inf)


def check_by_ratio(
  logits: Float32[Array, 'batch window codebook'],
  proposals: Float32[Array, 'batch window codebook'],
  drafts: Int32[Array, 'batch window'],
  uniform: Float32[Array, 'batch window'],
) -> tuple[Int32[Array, 'batch'], Float32[Array, 'batch codebook']]:
  """Checks drafts such that the tokens are samples from the softmax of `logits`.

  Args:
    logits: logits of each token after the drafts before it; the distributions p.
    proposals: logits of the distributions q that the drafts were sampled from.
    drafts: the drafts.
    uniform: noise of each check, uniform in [0, 1).

  Returns:
    The number of drafts accepted before the first one that is rejected, and logits of the
    distribution from which to replace that one.
  """
  target, proposed = jax.nn.softmax(logits), jax.nn.softmax(proposals)
  # A masked sum instead of indexing, which would gather a codebook that is split over devices.
  drafted = jnp.arange(logits.shape[-1]) == drafts[..., None]
  probability = lambda chances: jnp.sum(jnp.where(drafted, chances, 0.0), axis=-1)
  accepted = _leading(uniform * probability(proposed) < probability(target))
  rejected = jnp.minimum(accepted, drafts.shape[1] - 1)[:, None, None]
  target, proposed = (
    jnp.take_along_axis(chances, rejected, axis=1)[:, 0] for chances in (target, proposed)
  )
  rest = jnp.maximum(target - proposed, 0.0)
  # Rounding can leave nothing where both are equal.
  rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, target)
  return accepted, jnp.log(rest)


def _leading(found: Bool[Array, 'batch window']) -> Int32[Array, 'batch']:
  """Returns how many places from the first on are True."""
  return jnp.sum(jnp.cumprod(found.astype(jnp.int32), axis=1), axis=1)


class _Speculation:
  """Steps of the loop; the arguments are those of `sample_tokens`."""

  def __init__(
    self,
    config: generators.Config,
    params: dict[str, Any],
    keys: Key[Array, 'batch'],
    sampling: decoding.Sampling,
  ):
    self._config = config
    self._keys = keys
    self._sampling = sampling.at_each_position(config.image_length)
    self._window = min(sampling.window, config.image_length)
    # An image's noise is numbered. There are three kinds, each with a number for every position of a
    # window, which is less than 2 · image_length: noise to sample the token of a position, which has
    # the numbers of sequential sampling; to check the draft there; and to replace it.
    self._first_check_noise = 2 * config.image_length
    self._first_replacement_noise = 4 * config.image_length
    self._apply: Callable[..., Any] = functools.partial(
      generators.decoder(config).apply, {'params': params['image_decoder']}
    )
    self._adaptive: adaptive.AdaptiveDecoder | None = None
    if sampling.exit_threshold is not None or sampling.skip_threshold is not None:
      self._adaptive = adaptive.AdaptiveDecoder(config, params, look_ahead=True)

  def begin(self, states: tuple[transformer.DecoderState, ...]) -> _Progress:
    """Returns the progress before the first pass.

    Args:
      states: the result of `adaptive.init_states`.
    """
    batch, positions = len(self._keys), self._config.image_length + self._window
    usage, start = None, jnp.zeros(batch, jnp.int32)
    if self._adaptive is not None:
      usage = adaptive.Usage(
        jnp.zeros((batch, positions), jnp.int32),
        jnp.zeros((batch, positions), bool),
        jnp.zeros((batch, positions, 2), jnp.int32),
      )
    # A position for each row.
    states = tuple(
      state.replace(position=jnp.zeros(len(state.text_mask), jnp.int32)) for state in states
    )
    tokens = jnp.zeros((batch, _place(positions)), jnp.int32)
    nothing = jnp.zeros((batch, self._window, self._config.codebook_size))
    tokens, proposals = self._draft(nothing, tokens, start, first_new=start)
    return _Progress(tokens, start, states, proposals, start, jnp.int32(0), usage)

  def unfinished(self, progress: _Progress) -> Bool[Array, '']:
    """Returns whether an image of the batch lacks tokens."""
    return jnp.any(progress.start < self._config.image_length)

  def step(self, progress: _Progress) -> _Progress:
    """Runs a pass, accepts tokens, and drafts the next window."""
    start, window = progress.start, self._window
    logits, entries, usage = self._logits(progress)
    if not self._sampling.greedy:
      logits = decoding.sampled_logits(logits, self._sampling)
    accepted, decided = self._accept(logits, progress)
    count = jnp.minimum(accepted + 1, window)
    count = jnp.minimum(count, self._config.image_length - start)  # 0 once an image is finished.
    # Where the window now reaches beyond what was computed, its last distribution is repeated.
    source = jnp.minimum(jnp.arange(window) + count[:, None], window - 1)
    tokens, proposals = self._draft(
      jnp.take_along_axis(logits, source[..., None], axis=1),
      _write(progress.tokens, decided, _place(start)),
      start + count,
      first_new=start + window,
    )
    return _Progress(
      tokens,
      start + count,
      self._advanced(progress.states, entries, count),
      proposals,
      progress.passes + (count > 0),
      progress.computed + 1,
      jax.tree.map(lambda whole, part: _write(whole, part, start), progress.usage, usage),
    )

  def _logits(self, progress: _Progress):
    """Runs a pass over the window.

    Returns:
      Guided logits, float32 [batch, window, codebook]; the entries of each state; and the Usage of
      the window, None unless a threshold is set.
    """
    start, sampling = progress.start, self._sampling
    # One place before that of the window's first token.
    previous = _read(progress.tokens, start, self._window)
    last = self._config.image_length - 1
    scale = jnp.asarray(sampling.guidance_scale)[jnp.minimum(self._positions(start), last)]
    if self._adaptive is not None:
      logits, passes, usage = adaptive.step_logits(
        self._adaptive, previous, progress.states, scale[..., None], sampling
      )
      computed = jnp.broadcast_to(usage.computed, previous.shape + usage.computed.shape)
      return logits, [done.entries for done in passes], usage.replace(computed=computed)
    rows = 2 if sampling.guided else 1
    previous = jnp.repeat(previous, rows, axis=0)
    logits, entries = self._apply(previous, *progress.states, method='look_ahead')
    if sampling.guided:
      logits = decoding.guide(logits, scale[..., None])
    return logits, [entries], None

  def _advanced(self, states, entries, count) -> tuple[transformer.DecoderState, ...]:
    """Returns the states with `count` more positions of each image."""
    counts = [jnp.repeat(count, len(state.text_mask) // len(count)) for state in states]
    return tuple(
      decoding.in_cache_layout(state.advanced(entry, count, self._config.patterns))
      for state, entry, count in zip(states, entries, counts)
    )

  def _accept(
    self, logits: Float32[Array, 'batch window codebook'], progress: _Progress
  ) -> tuple[Int32[Array, 'batch'], Int32[Array, 'batch window']]:
    """Decides about the drafts of the window.

    Args:
      logits: logits of each token after the drafts before it, with temperature and filters.
      progress: the progress before this pass.

    Returns:
      The number of drafts accepted before the first one that is rejected, and the window's tokens
      up to this one, with its replacement. What follows has no meaning.
    """
    start = progress.start
    drafts = _read(progress.tokens, _place(start), self._window)
    if progress.proposals is None:
      tokens = self._sample(logits, start)
      return _leading(tokens == drafts), tokens
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(
      self._keys, self._first_check_noise + self._positions(start)
    )
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    accepted, rest = check_by_ratio(logits, progress.proposals, drafts, uniform)
    number = self._first_replacement_noise + start + accepted
    noise = decoding.gumbel_noise(self._keys, number, rest.shape[-1])
    replacement = decoding.likeliest(rest + noise)
    rejected = jnp.arange(self._window) == accepted[:, None]
    return accepted, jnp.where(rejected, replacement[:, None], drafts)

  def _draft(
    self,
    proposals: Float32[Array, 'batch window codebook'],
    tokens: Int32[Array, 'batch places'],
    start: Int32[Array, 'batch'],
    first_new: Int32[Array, 'batch'],
  ) -> tuple[Int32[Array, 'batch places'], Float32[Array, 'batch window codebook'] | None]:
    """Drafts the tokens of a window.

    Args:
      proposals: logits of the distributions to sample from; at new positions, the last computed.
      tokens: as in _Progress, with the accepted tokens.
      start: first position of the window to draft, after the accepted tokens.
      first_new: first position that no pass has computed yet, in the window or just after it.

    Returns:
      The tokens with the drafts, and the logits of the distributions that they were sampled from.
    """
    new = self._positions(start) >= first_new[:, None]
    if self._sampling.drafts == 'random':
      proposals = jnp.where(new[..., None], 0.0, proposals)
    drafts = self._sample(proposals, start)
    tokens = _write(tokens, drafts, _place(start))
    if self._sampling.drafts in ('left', 'above'):
      neighbors = self._neighbors(start, first_new)
      copied = jnp.take_along_axis(tokens, _place(neighbors), axis=1)
      drafts = jnp.where(new, copied, drafts)
      proposals = jnp.where(new[..., None], _only(drafts, proposals.shape[-1]), proposals)
      tokens = _write(tokens, drafts, _place(start))
    by_ratio = self._sampling.rule == 'ratio' and not self._sampling.greedy
    return tokens, proposals if by_ratio else None

  def _sample(
    self, logits: Float32[Array, 'batch window codebook'], start: Int32[Array, 'batch']
  ) -> Int32[Array, 'batch window']:
    """Samples the window's tokens from the softmax of logits, with the noise of sequential sampling.

    Args:
      logits: logits of the window's tokens.
      start: first position of the window.
    """
    if not self._sampling.greedy:
      noise = lambda position: decoding.gumbel_noise(self._keys, position, logits.shape[-1])
      logits = logits + jax.vmap(noise, 1, 1)(self._positions(start))
    return decoding.likeliest(logits)

  def _positions(self, start: Int32[Array, 'batch']) -> Int32[Array, 'batch window']:
    """Returns the positions of the window that begins at `start`."""
    return start[:, None] + jnp.arange(self._window)

  def _neighbors(
    self, start: Int32[Array, 'batch'], first_new: Int32[Array, 'batch']
  ) -> Int32[Array, 'batch window']:
    """Returns the position from which each position of the window copies its token, if it is new.

    It is the nearest one before `first_new` in the row of the grid or in the column, or in the other
    of the two if there is none; before the first position, −1.

    Args:
      start: first position of the window.
      first_new: an argument of `_draft`.
    """
    positions, columns = self._positions(start), self._config.grid[1]
    nearest = first_new[:, None] - 1
    above = positions - columns * (-(-(positions - nearest) // columns))
    if self._sampling.drafts == 'left':
      return jnp.where(nearest >= positions - positions % columns, nearest, jnp.maximum(above, -1))
    return jnp.where(above >= 0, above, nearest)


def sample_tokens(
  config: generators.Config,
  params: dict[str, Any],
  text_tokens: Int32[Array, 'batch text_length'],
  keys: Key[Array, 'batch'],
  sampling: decoding.Sampling,
) -> tuple[Int32[Array, 'batch image_length'], Passes, adaptive.Usage | None]:
  """Samples the image tokens of a batch like `decoding.sample_tokens`, in fewer passes.

  Tokens have the same distribution. If greedy, or with the rule 'equal', they are the same tokens.

  Args:
    config: sizes of the network.
    params: the result of `parameters.for_sampling`.
    text_tokens: tokens of the prompts, padded with 0.
    keys: the result of `decoding.image_keys`.
    sampling: how to sample, with a positive `window`.

  Returns:
    The image tokens; how many passes they took; and what they computed in the pass that accepted
    them, None unless a threshold is set.
  """
  length = config.image_length
  speculation = _Speculation(config, params, keys, sampling)
  states = adaptive.init_states(config, params, text_tokens, sampling, length)
  last = jax.lax.while_loop(speculation.unfinished, speculation.step, speculation.begin(states))
  passes = Passes(last.passes, jnp.broadcast_to(last.computed, last.passes.shape))
  usage = jax.tree.map(lambda part: part[:, :length], last.usage)
  return last.tokens[:, _place(0) : _place(length)], passes, usage
