"""The compiled programs of a loaded model: sampling, and the image tokenizer in both directions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import UInt8
from jaxtyping import UInt32

from parti_jax.models import generators
from parti_jax.models import pixels
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import transformer
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import kept_programs
from parti_jax.sampling import speculative

# So that programs with such results can be kept, by `kept_programs`.
for _node in (adaptive.Usage, speculative.Passes):
  export.register_pytree_node_serialization(
    _node,
    serialized_name=f'{_node.__module__}.{_node.__qualname__}',
    serialize_auxdata=lambda unused_fields: b'',
    deserialize_auxdata=lambda unused_bytes: (),
  )


@kept_programs.keep
@functools.partial(jax.jit, static_argnames=('config', 'tokenizer'))
def generate(
  generator_params: dict[str, Any],
  tokenizer_params: dict[str, Any],
  texts: Int32[Array, 'batch text_length'],
  image_index: Int32[Array, 'batch'],
  seed: UInt32[Array, ''],
  sampling: decoding.Sampling,
  *,
  config: generators.Config,
  tokenizer: nn.Module,
) -> tuple[
  Int32[Array, 'batch image_length'],
  UInt8[Array, 'batch height width 3'],
  adaptive.Usage | None,
  speculative.Passes | None,
]:
  """Samples image tokens and decodes them.

  Args:
    generator_params: the result of `parameters.for_sampling`.
    tokenizer_params: parameters of the image tokenizer.
    texts: text tokens of the prompts.
    image_index: index of each image among those of its prompt.
    seed: the seed of all images.
    sampling: how to sample.
    config: sizes of the generator.
    tokenizer: the image tokenizer.

  Returns:
    The tokens, the pictures, what the tokens computed if the settings skip anything, and the passes
    they took if sampling is speculative.
  """
  keys = decoding.image_keys(seed, image_index)
  usage = passes = None
  if sampling.window:
    tokens, passes, usage = speculative.sample_tokens(
      config, generator_params, texts, keys, sampling
    )
  elif sampling.exit_threshold is None and sampling.skip_threshold is None:
    tokens = decoding.sample_tokens(config, generator_params, texts, keys, sampling)
  else:
    tokens, usage = adaptive.sample_tokens(config, generator_params, texts, keys, sampling)
  apply: Callable[..., Any] = tokenizer.apply
  drawn = apply({'params': tokenizer_params}, tokens, method='detokenize')
  return tokens, pixels.to_bytes(drawn), usage, passes


@kept_programs.keep
@functools.partial(jax.jit, static_argnames=('config', 'tokenizer', 'prefix'))
def steer(
  generator_params: dict[str, Any],
  tokenizer_params: dict[str, Any],
  texts: Int32[Array, 'batch text_length'],
  image_index: Int32[Array, 'batch'],
  steering: decoding.Steering,
  seed: UInt32[Array, ''],
  sampling: decoding.Sampling,
  *,
  config: generators.Config,
  tokenizer: nn.Module,
  prefix: int,
) -> tuple[Int32[Array, 'batch image_length'], UInt8[Array, 'batch height width 3']]:
  """Samples image tokens that follow more than the prompts, and decodes them.

  The arguments are those of `generate`, and:

  Args:
    generator_params: see `generate`.
    tokenizer_params: see `generate`.
    texts: see `generate`.
    image_index: see `generate`.
    steering: what to follow besides the prompts.
    seed: see `generate`.
    sampling: how to sample, without thresholds and window.
    config: see `generate`.
    tokenizer: see `generate`.
    prefix: an argument of `decoding.begin`.

  Returns:
    The tokens and the pictures.
  """
  keys = decoding.image_keys(seed, image_index)
  tokens = decoding.sample_tokens(config, generator_params, texts, keys, sampling, steering, prefix)
  apply: Callable[..., Any] = tokenizer.apply
  drawn = apply({'params': tokenizer_params}, tokens, method='detokenize')
  return tokens, pixels.to_bytes(drawn)


@functools.partial(jax.jit, static_argnames=('config', 'prefix'))
def begin(
  generator_params: dict[str, Any],
  texts: Int32[Array, 'batch text_length'],
  steering: decoding.Steering,
  sampling: decoding.Sampling,
  *,
  config: generators.Config,
  prefix: int,
) -> tuple[Int32[Array, 'batch'], transformer.DecoderState]:
  """`decoding.begin`, for `advance`."""
  return decoding.begin(config, generator_params, texts, sampling, steering, prefix)


@functools.partial(jax.jit, static_argnames=('config', 'count', 'length'))
def advance(
  generator_params: dict[str, Any],
  image_index: Int32[Array, 'batch'],
  steering: decoding.Steering,
  carry: tuple[Int32[Array, 'batch'], transformer.DecoderState],
  position: Int32[Array, ''],
  seed: UInt32[Array, ''],
  sampling: decoding.Sampling,
  *,
  config: generators.Config,
  count: int,
  length: int,
) -> tuple[tuple[Int32[Array, 'batch'], transformer.DecoderState], Int32[Array, 'batch {count}']]:
  """Samples the next tokens of a batch.

  Args:
    generator_params: the result of `parameters.for_sampling`.
    image_index: index of each image among those of its prompt.
    steering: what to follow besides the prompts.
    carry: the result of `begin`, or the previous carry.
    position: the position of the next token.
    seed: the seed of all images.
    sampling: how to sample, without thresholds and window.
    config: sizes of the generator.
    count: number of tokens.
    length: `decoding.cache_length` of the last of them.

  Returns:
    The next carry, and the tokens.
  """
  keys = decoding.image_keys(seed, image_index)
  sampling = sampling.at_each_position(config.image_length)
  previous, state = carry
  state = decoding.grow(config, state, length)
  step = functools.partial(
    decoding.sample_step, config, generator_params, keys, sampling, steering=steering
  )
  carry, tokens = jax.lax.scan(step, (previous, state), position + jnp.arange(count))
  return carry, tokens.T


@functools.partial(jax.jit, static_argnames=('config', 'cache'))
def log_likelihoods(
  generator_params: dict[str, Any],
  texts: Int32[Array, 'batch text_length'],
  text_weights: Float32[Array, 'batch text_length'] | None,
  tokens: Int32[Array, 'batch image_length'],
  *,
  config: generators.Config,
  cache: str,
) -> Float32[Array, 'batch image_length']:
  """Returns the log-likelihood of each image token given the text and the earlier tokens, in nats.

  It is that of the distribution that the model learned: without guidance, temperature and filters.

  Args:
    generator_params: the result of `parameters.for_sampling`.
    texts: text tokens of the prompts.
    text_weights: a field of `decoding.Steering`.
    tokens: image tokens.
    config: sizes of the generator.
    cache: how to hold keys and values, a name in `sampling_settings.CACHES`.
  """
  state = decoding.init_state(config, generator_params, texts, config.image_length, cache)
  if text_weights is not None:
    state = decoding.weigh_texts(config, generator_params, state, text_weights)
  apply: Callable[..., Any] = generators.decoder(config).apply
  previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
  logits, _ = apply({'params': generator_params['image_decoder']}, previous, state=state)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames='tokenizer')
def tokenize(
  params: dict[str, Any], images: UInt8[Array, 'batch height width 3'], *, tokenizer: nn.Module
) -> Int32[Array, 'batch image_length']:
  """Encodes pictures to image tokens."""
  apply: Callable[..., Any] = tokenizer.apply
  return apply({'params': params}, pixels.from_bytes(images), method='tokenize')


@functools.partial(jax.jit, static_argnames='tokenizer')
def reconstruct(
  params: dict[str, Any], images: UInt8[Array, 'batch height width 3'], *, tokenizer: nn.Module
) -> UInt8[Array, 'batch height width 3']:
  """Encodes pictures to image tokens and decodes these."""
  apply: Callable[..., Any] = tokenizer.apply
  originals = pixels.from_bytes(images)
  if isinstance(tokenizer, vit_vqgan.ViTVQGAN):
    # The last bits differ from those of `detokenize`, and so would bytes of earlier versions.
    mean = apply({'params': params}, originals)['mean']
    return pixels.to_bytes(jnp.clip(vit_vqgan.to_pixels(mean), 0.0, 1.0))
  tokens = apply({'params': params}, originals, method='tokenize')
  return pixels.to_bytes(apply({'params': params}, tokens, method='detokenize'))
