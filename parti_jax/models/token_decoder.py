"""The image-token decoder (Parti, section 2.2), which predicts the next image token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer


class CausalDecoder(nn.Module):
  """What the image-token decoders of all kinds of generator have: a stack of blocks, and logits.

  A subclass defines `next_inputs`.

  Attributes:
    config: sizes; a `generators.Config`.
  """

  config: Any

  def setup(self):
    config = self.config
    self.token_embedding = layers.Embedding(config.codebook_size, config.width)
    self.decoder = transformer.Decoder(
      num_layers=config.decoder_layers,
      width=config.width,
      mlp_width=config.mlp_width,
      heads=config.heads,
      patterns=config.patterns,
      dropout=config.dropout,
      dtype=config.compute_dtype,
      remat=config.remat,
      unroll=config.unroll,
      options=config.decoder_options,
    )
    self.logits = layers.Projection((config.codebook_size,), 1, ('embed', 'vocab'))
    self.drop = layers.Dropout(config.dropout)

  def next_inputs(
    self, previous: Int[Array, 'batch length'], state: transformer.DecoderState
  ) -> Float[Array, 'batch length embed']:
    """Returns the first layer's input at the next positions; the arguments are as `look_ahead`'s."""
    raise NotImplementedError

  def look_ahead(
    self, previous: Int[Array, 'batch length'], state: transformer.DecoderState
  ) -> tuple[Float[Array, 'batch length codebook'], list[transformer.Entry]]:
    """Computes the logits of the next positions, of which the caller chooses how many to keep.

    Args:
      previous: the token before each position. Rows may reach beyond the last position; what they
        get there has no meaning.
      state: the state before these positions, with a position for each row.

    Returns:
      Float32 logits, and the keys and values of the positions for `DecoderState.advanced`.
    """
    x, entries = self.decoder.look_ahead(self.next_inputs(previous, state), state)
    return self.logits_from(x), entries

  def logits_from(
    self, outputs: Float[Array, 'batch length embed']
  ) -> Float[Array, 'batch length codebook']:
    """Returns the float32 logits for the outputs of one layer."""
    logits = self.logits(outputs.astype(jnp.float32))
    return nn.with_logical_constraint(
      logits, ('activation_batch', 'activation_length', 'activation_vocab')
    )

  def layer_logits(
    self, x: Float[Array, 'batch length embed']
  ) -> Float[Array, 'batch length codebook']:
    """Returns the float32 logits that the output of any layer predicts, before the final norm."""
    return self.logits_from(self.decoder.norm(x))


class TokenDecoder(CausalDecoder):
  """A causal Transformer over image tokens in raster order, with cross-attention to the text.

  The input at a position is the previous token, and at the first position a learned vector. The
  embedding table therefore has exactly one row for each code and can be split evenly.

  Attributes:
    config: sizes.
  """

  config: parti_config.PartiConfig

  def setup(self):
    super().setup()
    config = self.config
    rows, columns = config.grid
    self.begin = layers.parameter(
      self, 'begin', nn.initializers.normal(0.02), ('norm',), (config.width,)
    )
    if config.positions == 'learned':
      self.row_embedding = layers.Embedding(rows, config.width, ('position', 'embed'))
      self.column_embedding = layers.Embedding(columns, config.width, ('position', 'embed'))

  def __call__(
    self,
    previous: Int[Array, 'batch length'],
    encoded: Float[Array, 'batch text_length features'] | None = None,
    text_mask: Bool[Array, 'batch 1 1 text_length'] | None = None,
    state: transformer.DecoderState | None = None,
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> tuple[Float[Array, 'batch length codebook'], transformer.DecoderState | None]:
    """Computes the logits of a whole sequence, or with a state those of the next positions.

    Args:
      previous: the token before each position, such as the result of `shifted`. The value for
        position 0 is not used.
      encoded: the output of the text encoder; not used with a state, which holds the text.
      text_mask: True where a text token may be attended to; not used with a state.
      state: the state after the previous positions; None for a whole sequence.
      dropout_keys: keys of the decoder; None if dropout is off.

    Returns:
      Float32 logits, and the state with these positions, or None for a whole sequence.
    """
    position = 0 if state is None else state.position
    x = self.embed(previous, position, layers.fold(dropout_keys, 0))
    x, state = self.decoder(x, encoded, text_mask, state, layers.fold(dropout_keys, 1))
    return self.logits_from(x), state

  def next_inputs(
    self, previous: Int[Array, 'batch length'], state: transformer.DecoderState
  ) -> Float[Array, 'batch length embed']:
    """Returns the first layer's input at the next positions; the arguments are as `look_ahead`'s."""
    return self.embed(previous, state.position)

  def all_layer_outputs(
    self,
    previous: Int[Array, 'batch length'],
    encoded: Float[Array, 'batch text_length features'],
    text_mask: Bool[Array, 'batch 1 1 text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'layers batch length embed']:
    """Returns the outputs of all layers for a whole sequence.

    The arguments are those of `__call__`, whose logits are `logits_from` of the last layer's output.
    """
    x = self.embed(previous, 0, layers.fold(dropout_keys, 0))
    keys = layers.fold(dropout_keys, 1)
    return self.decoder(x, encoded, text_mask, dropout_keys=keys, all_layers=True)[0]

  def embed(
    self,
    previous: Int[Array, 'batch length'],
    position: int | Int[Array, ''] | Int[Array, 'batch'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Returns the input of the first layer.

    Args:
      previous: the token before each position.
      position: the first of these positions, in all rows or in each.
      dropout_keys: keys of this input; None if dropout is off.
    """
    positions = jnp.asarray(position)[..., None] + jnp.arange(previous.shape[1])
    # Beyond the grid, an embedding would be NaN, which spoils even what a mask hides.
    positions = jnp.minimum(positions, self.config.image_length - 1)
    columns = self.config.grid[1]
    x = jnp.where((positions == 0)[..., None], self.begin, self.token_embedding(previous))
    if self.config.positions == 'learned':
      x = x + (
        self.row_embedding(positions // columns) + self.column_embedding(positions % columns)
      )
    return self.drop(x.astype(self.config.compute_dtype), dropout_keys)


def block(config: Any) -> transformer.DecoderBlock:
  """Returns the module of one layer of a generator's decoder, without dropout."""
  return transformer.DecoderBlock(
    config.width,
    config.mlp_width,
    config.heads,
    dtype=config.compute_dtype,
    options=config.decoder_options,
    parent=None,
  )


def shifted(image_tokens: Int[Array, 'batch length']) -> Int[Array, 'batch length']:
  """Returns the token before each position, and 0 for the first position."""
  return jnp.pad(image_tokens[:, :-1], ((0, 0), (1, 0)))
