"""Parti and its image tokenizer as t5x models, which apply the same modules as our own training."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from jaxtyping import Array
from jaxtyping import Float32
from jaxtyping import Shaped
from t5x import decoding
from t5x import losses
from t5x import metrics as t5x_metrics
from t5x import models as t5x_models

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import image_sizes
from parti_jax.data import feature_converter
from parti_jax.data import vocabulary
from parti_jax.exported_model import sampling_settings
from parti_jax.models import generators
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer
from parti_jax.sampling import decoding as our_decoding
from parti_jax.sampling import parameters
from parti_jax.t5x import logical_axes
from parti_jax.t5x import workarounds
from parti_jax.training import skipped_steps
from parti_jax.training.objectives import tokenizer_objective

workarounds.apply()

# An id that isn't an image token, since pictures have no end token.
_NO_EOS = -1


def _keys(rng, batch: int) -> layers.DropoutKeys | None:
  """Makes dropout keys from t5x's key, which may be one of JAX's untyped keys."""
  if rng is None:
    return None
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    rng = jax.random.wrap_key_data(rng)
  return layers.dropout_keys(rng, batch)


def _microbatch_share(rows: int | None, array: Shaped[Array, 'batch ...']) -> float:
  """Returns the share of a microbatch in the batch, since t5x sums the losses of microbatches.

  Args:
    rows: size of the batch for which t5x initialized the model; None if it didn't.
    array: an array of the microbatch, or of a batch whose size does not divide `rows`.
  """
  return len(array) / rows if rows and rows % len(array) == 0 else 1.0


class PartiModel(t5x_models.BaseTransformerModel):
  """Text to image tokens (Parti, section 2.2).

  A batch has 'encoder_input_tokens', int32 [batch, text_length], padded with 0;
  'decoder_target_tokens', int32 [batch, image_length], in [0, codebook_size), where 0 is a code like
  any other; and 'decoder_loss_weights', float32 [batch, image_length].

  Args:
    module: the network, of any kind in `generators.KINDS`.
    optimizer_def: an optimizer of `parti_jax.t5x.optimizers` or of t5x.
    input_vocabulary: vocabulary of the tasks' feature 'inputs'; None for one with exactly
      `PartiConfig.text_vocabulary` pieces.
    output_vocabulary: vocabulary of the tasks' feature 'targets'; None for the codebook.
    decode_fn: samples image tokens from logits with t5x's interface: `temperature_sample` or
      `beam_search` of t5x.decoding, or another function. It gets guided logits.
    guidance_scale: weight of classifier-free guidance (Parti, section 2.4). 1 disables it, which
      takes half the time.
    depth_loss_weights: weights of the losses of the layers, as in GeneratorObjective, for early
      exit.
    label_smoothing: label smoothing of t5x's loss.
    z_loss: weight of t5x's z-loss.
    loss_normalizing_factor: divides the sum of the loss over tokens. The default gives the mean
      over the batch's image tokens. This also holds with `Trainer.num_microbatches`, although t5x
      sums the gradients of microbatches.

  Raises:
    UserError: if a vocabulary or the weights do not match the network.
  """

  FEATURE_CONVERTER_CLS = feature_converter.PartiFeatureConverter

  def __init__(
    self,
    module: nn.Module,
    optimizer_def,
    input_vocabulary: seqio.Vocabulary | None = None,
    output_vocabulary: seqio.Vocabulary | None = None,
    decode_fn=decoding.temperature_sample,
    guidance_scale: float = 1.0,
    depth_loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor='NUM_REAL_TARGET_TOKENS',
  ):
    config = module.config
    if input_vocabulary is None:
      input_vocabulary = seqio.PassThroughVocabulary(
        config.text_vocabulary, eos_id=vocabulary.EOS_ID
      )
    if output_vocabulary is None:
      output_vocabulary = seqio.PassThroughVocabulary(config.codebook_size)
    for name, found, key in (
      ('input', input_vocabulary, 'text_vocabulary'),
      ('output', output_vocabulary, 'codebook_size'),
    ):
      if found.vocab_size > getattr(config, key):
        raise errors.UserError(
          f'PartiModel.{name}_vocabulary has {found.vocab_size} ids, but the network has '
          f'PartiConfig.{key}={getattr(config, key)}; increase it or choose another task'
        )
    self.guidance_scale = checks.number(
      'PartiModel.guidance_scale', guidance_scale, 0, sampling_settings.MOST_GUIDANCE
    )
    self._depth_weights = _check_depth_weights(depth_loss_weights, config)
    self._rows: int | None = None  # Size of the training batch, once t5x has passed it.
    super().__init__(
      module,
      input_vocabulary,
      output_vocabulary,
      optimizer_def,
      decode_fn,
      label_smoothing,
      z_loss,
      loss_normalizing_factor,
    )

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """Initializes the parameters and their logical axes, with t5x's arguments.

    Raises:
      UserError: if the lengths of the features differ from the network's.
    """
    del input_types
    config = self.module.config
    for feature, key, length in (
      ('inputs', 'text_length', config.text_length),
      ('targets', 'grid', config.image_length),
    ):
      name = 'encoder_input_tokens' if feature == 'inputs' else 'decoder_target_tokens'
      if input_shapes[name][1] != length:
        raise errors.UserError(
          f'TASK_FEATURE_LENGTHS[{feature!r}]={input_shapes[name][1]} is not the {length} of '
          f'PartiConfig.{key}; make them the same'
        )
    self._rows = input_shapes['encoder_input_tokens'][0]
    with logical_axes.bound():
      boxed = self.module.init(rng, *generators.example_inputs(config))['params']
      return logical_axes.variables(boxed)

  def _apply(self, params, *args, **kwargs):
    with logical_axes.bound():
      return self.module.apply({'params': flax.core.unfreeze(params)}, *args, **kwargs)

  def _inputs(self, batch, dropout_rng):
    tokens = batch['encoder_input_tokens']
    return tokens, batch['decoder_target_tokens'], _keys(dropout_rng, tokens.shape[0])

  def _compute_logits(self, params, batch, dropout_rng=None):
    """Returns the logits, float32 [batch, image_length, codebook]."""
    return self._apply(params, *self._inputs(batch, dropout_rng))

  def loss_fn(self, params, batch, dropout_rng):
    """Computes the mean cross entropy of image tokens and t5x's metrics, with t5x's arguments.

    For a microbatch, which is smaller than the batch for which t5x initialized the model, the loss
    is its share of the mean over the batch.
    """
    share = _microbatch_share(self._rows, batch['encoder_input_tokens'])
    return self._loss(params, batch, dropout_rng, self._depth_weights, share)

  def eval_fn(self, params, batch):
    """Computes the last layer's loss without dropout and t5x's metrics, with t5x's arguments."""
    return self._loss(params, batch, None, None, 1.0)

  def _loss(self, params, batch, dropout_rng, depth_weights, share: float):
    """Computes the loss and metrics.

    Args:
      params: the parameters.
      batch: as the class describes.
      dropout_rng: a key; None disables dropout.
      depth_weights: weights of the losses of all layers; None for only the last layer's loss.
      share: the result of `_microbatch_share`, which scales a mean.
    """
    targets = batch['decoder_target_tokens']
    factor, weights = losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    if isinstance(self._loss_normalizing_factor, (str, losses.SpecialLossNormalizingFactor)):
      factor = factor / share

    def of_logits(logits):
      return jnp.stack(
        losses.compute_weighted_cross_entropy(
          logits, targets, weights, self._label_smoothing, self._z_loss, factor
        )[:2]
      )

    if depth_weights is None:
      logits = self._compute_logits(params, batch, dropout_rng)
      total = of_last = of_logits(logits)
    else:
      outputs = self._apply(params, *self._inputs(batch, dropout_rng), method='all_layer_outputs')
      of_layer = lambda output: of_logits(self._apply(params, output, method='logits_from'))
      logits = self._apply(params, outputs[-1], method='logits_from')
      of_last = of_logits(logits)
      total, before = depth_weights[-1] * of_last, np.flatnonzero(depth_weights[:-1])
      if before.size:  # One layer at a time, since the logits of all would not fit into memory.
        of_others = jax.lax.map(
          layer_stack.remat(of_layer, self.module.config.remat), outputs[before]
        )
        total += jnp.sum(of_others * depth_weights[before][:, None], axis=0)
    metrics = self._compute_metrics(
      logits=logits,
      targets=targets,
      mask=weights,
      loss=total[0],
      z_loss=total[1],
      segment_ids={
        'encoder_input_tokens': batch['encoder_input_tokens'] != 0,
        'decoder_target_tokens': weights > 0,
      },
    )
    if depth_weights is not None:
      metrics['last_layer_loss'] = t5x_metrics.AveragePerStep(total=of_last[0])
    return total[0], metrics

  def score_batch(self, params, batch, return_intermediates: bool = False):
    """Computes the log likelihoods of image tokens given the text.

    Args:
      params: the parameters.
      batch: as the class describes.
      return_intermediates: whether to return the summands too.

    Returns:
      The log likelihoods, float32 [batch]. With `return_intermediates` also {'decoder':
      {'token_scores', 'target_tokens', 'loss_weights'}}, where each is a tuple of one array
      [batch, image_length].
    """
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
    of_tokens, _ = layers.cross_entropy(self._compute_logits(params, batch), targets)
    of_tokens = -of_tokens * weights
    scores = jnp.sum(of_tokens, axis=-1)
    if not return_intermediates:
      return scores
    return scores, {
      'decoder': {
        'token_scores': (of_tokens,),
        'target_tokens': (targets,),
        'loss_weights': (weights,),
      }
    }

  def predict_batch_with_aux(
    self,
    params,
    batch,
    rng=None,
    decoder_params: Mapping[str, Any] | None = None,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
  ):
    """Samples image tokens for texts, with a cache.

    Args:
      params: the parameters.
      batch: a dict with 'encoder_input_tokens', as the class describes; the rest is ignored.
      rng: a key for `decode_fn`.
      decoder_params: more arguments of `decode_fn`.
      return_all_decodes: whether to return all pictures of a text instead of the likeliest.
      num_decodes: number of pictures to sample for each text.

    Returns:
      The tokens, int32 [batch, image_length], and {'scores': float32 [batch]}, their log
      likelihoods from `decode_fn`. With `return_all_decodes` they are [batch, num_decodes,
      image_length] and [batch, num_decodes], in ascending order of the scores.
    """
    config, guided = self.module.config, self.guidance_scale != 1.0
    texts = batch['encoder_input_tokens']
    if guided:
      texts = our_decoding.with_and_without(config, texts)
    sampling_params = parameters.for_sampling(config, flax.core.unfreeze(params))
    first_state = self._apply(sampling_params, texts, method='encode_text')
    of_image = lambda array: array.reshape((-1, 2 if guided else 1) + array.shape[1:])
    of_text = lambda array: array.reshape((-1,) + array.shape[2:])
    of_texts = jax.tree.map(
      lambda array: of_text(decoding.flat_batch_beam_expand(of_image(array), num_decodes)),
      first_state.of_texts,
    )

    def tokens_to_logits(state: decoding.DecodingState):
      caches = [
        tuple(of_text(state.cache[f'layer_{layer}'][part]) for part in ('key', 'value'))
        for layer in range(config.decoder_layers)
      ]
      apply: Callable[..., Any] = generators.decoder(config).apply
      with logical_axes.bound():
        logits, after = apply(
          {'params': sampling_params['image_decoder']},
          jnp.repeat(state.cur_token, 2 if guided else 1, axis=0),
          state=transformer.DecoderState(jnp.max(state.cur_index), caches, **of_texts),
        )
      logits = logits[:, 0]
      if guided:
        logits = our_decoding.guide(logits, self.guidance_scale)
      return logits, _named(jax.tree.map(of_image, after.caches))

    arguments = {'eos_id': _NO_EOS, 'decode_rng': rng} | dict(decoder_params or {})
    decodes, scores = self._decode_fn(
      inputs=jnp.zeros((batch['encoder_input_tokens'].shape[0], config.image_length), jnp.int32),
      cache=_named(jax.tree.map(of_image, first_state.caches)),
      tokens_to_logits=tokens_to_logits,
      num_decodes=num_decodes,
      cache_offset=0,
      **arguments,
    )
    if return_all_decodes:
      return decodes, {'scores': scores}
    return decodes[:, -1], {'scores': scores[:, -1]}


def _named(caches):
  """Converts the caches of layers to the nested dict that t5x requires."""
  return {
    f'layer_{layer}': dict(zip(('key', 'value'), parts)) for layer, parts in enumerate(caches)
  }


def _check_depth_weights(weights, config) -> Float32[np.ndarray, 'layers'] | None:
  """Checks the weights and scales them to sum to 1."""
  if weights is None:
    return None
  if len(weights) != config.decoder_layers or min(weights) < 0 or weights[-1] <= 0:
    raise errors.UserError(
      f'PartiModel.depth_loss_weights={tuple(weights)!r} must be {config.decoder_layers} numbers, '
      'one for each of PartiConfig.decoder_layers, not negative, and the last one positive'
    )
  weights = np.array(weights, np.float32)
  return weights / weights.sum()


class TokenizerModel(t5x_models.BaseModel):
  """An image tokenizer (ViT-VQGAN, section 3), with the losses that t5x's interface supports.

  A batch has 'images', uint8 [batch, height, width, 3]. The state's mutables hold the use of codes:
  'statistics' with 'code_use', float32 [codebook], and 'step', int32 [], the number of calls of
  `loss_fn`, which t5x calls for each microbatch.

  Args:
    objective: the training objective.
    optimizer_def: an optimizer of `parti_jax.t5x.optimizers` or of t5x.

  Raises:
    UserError: if the objective needs what t5x doesn't support: a second optimizer (discriminator),
      parameters that the optimizer doesn't set (revived codes, frozen parts, averaged weights), or
      weights of other networks (LPIPS, a first phase).
  """

  FEATURE_CONVERTER_CLS = feature_converter.PictureFeatureConverter
  # Attributes of the objective that must be disabled -> the values that disable them.
  _OFF = {
    'adversarial_weight': 0.0,
    'perceptual_weight': 0.0,
    'ema': 0.0,
    'revive_every': 0,
    'frozen': (),
    'first_phase': None,
  }

  def __init__(self, objective: tokenizer_objective.TokenizerObjective, optimizer_def):
    for name, off in self._OFF.items():
      if getattr(objective, name) != off:
        raise errors.UserError(
          f"TokenizerObjective.{name}={getattr(objective, name)!r}: t5x doesn't support it; set it "
          f'to {off!r}, or train with parti-jax train'
        )
    self.objective = objective
    self._rows: int | None = None  # Size of the training batch, once t5x has passed it.
    super().__init__(optimizer_def)

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """Initializes the parameters, their logical axes and the mutables, with t5x's arguments.

    Raises:
      UserError: if the size of the pictures differs from the network's, or isn't square.
    """
    del input_types
    size = image_sizes.square(
      self.objective.model.image_size, 't5x trains on', 'use parti-jax train'
    )
    if input_shapes['images'][1] != size:
      raise errors.UserError(
        f"TASK_FEATURE_LENGTHS['images']={input_shapes['images'][1]} is not "
        f'{type(self.objective.model).__name__}.image_size={size}; make them the same'
      )
    self._rows = input_shapes['images'][0]
    with logical_axes.bound():
      boxed = self.objective.init(rng)
      statistics = self.objective.initial_statistics() | {'step': jnp.zeros((), jnp.int32)}
      return logical_axes.variables(boxed, statistics=statistics)

  def _loss(self, params, batch, step):
    with logical_axes.bound():
      return self.objective.loss(flax.core.unfreeze(params), batch, None, step)

  def _metrics(self, batch, values):
    count = len(batch['images'])
    return {name: t5x_metrics.AveragePerStep(total=value) for name, value in values.items()} | {
      'timing/seqs_per_second': t5x_metrics.TimeRate.from_model_output(numerator=count),
      'timing/steps_per_second': t5x_metrics.StepsPerTime.from_model_output(),
    }

  def loss_fn(self, params, batch, dropout_rng, flax_mutables):
    """Computes the training loss, with t5x's arguments.

    Returns:
      The loss, float32 [], and t5x's metrics with the mutables of the next step.
    """
    del dropout_rng  # The tokenizer has no dropout.
    before = flax.core.unfreeze(flax_mutables)['statistics']
    step = before['step']
    loss, aux = self._loss(params, batch, step)
    aux = jax.lax.stop_gradient(aux)
    kept = {'code_use': before['code_use']}
    _, after, more = self.objective.after_step(flax.core.unfreeze(params), kept, aux, step, None)
    # Codes of a step without a finite loss don't count; t5x computes the gradients later.
    after = skipped_steps.select(jnp.isfinite(loss), after, kept)
    mutables = flax.core.freeze({'statistics': after | {'step': step + 1}})
    share = _microbatch_share(self._rows, batch['images'])
    values = {name: share * value for name, value in (aux['metrics'] | more).items()}
    return share * loss, (self._metrics(batch, values), mutables)

  def eval_fn(self, params, batch, flax_mutables):
    """Computes the loss with quantized latents and t5x's metrics, with t5x's arguments."""
    del flax_mutables
    loss, aux = self._loss(params, batch, jnp.int32(self.objective.quantize_from))
    return loss, self._metrics(batch, aux['metrics'])

  def _evaluate(self, params, batch):
    with logical_axes.bound():
      return self.objective.evaluate(flax.core.unfreeze(params), batch)

  def predict_batch_with_aux(self, params, batch, rng=None):
    """Returns the image tokens, int32 [batch, image_length], and measures, float32 [batch] each.

    The measures are 'l2' and, in dB, 'psnr'.
    """
    del rng
    measures = self._evaluate(params, batch)
    return measures.pop('tokens'), measures

  def score_batch(self, params, batch, return_intermediates: bool = False):
    """Returns the negative mean squared errors of the reconstructions, float32 [batch].

    Raises:
      UserError: if `return_intermediates` is True, since there are none.
    """
    if return_intermediates:
      raise errors.UserError('TokenizerModel.score_batch has no intermediates')
    return -self._evaluate(params, batch)['l2']
