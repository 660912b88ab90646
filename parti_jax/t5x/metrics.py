"""Metrics of our tasks for seqio's evaluator, used by t5x's `infer_eval` and `t5x.eval`.

t5x computes them only in its first process, in a thread that runs during training. So the tokenizer
stays on the CPU, and reading it doesn't wait for other processes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import gin
import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8

from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import token_cache
from parti_jax.evaluation.openmoji import openmoji_judge
from parti_jax.sampling import detokenizing
from parti_jax.sampling import text_to_image
from parti_jax.t5x import checkpoints
from parti_jax.training.objectives import frozen_tokenizer

# Minimum share of the real pictures that the judge should recognize after detokenizing; 98% for the
# demo.
_LEAST_CEILING = 0.5


def postprocess(tokens: Sequence, example: Mapping[str, Any], is_target: bool = False):
  """Converts the tokens that seqio decoded for the metrics of this module.

  Args:
    tokens: image tokens [length], or [num_decodes, length] if several pictures were sampled.
    example: an example of the task, with its caption as 'inputs_pretokenized'.
    is_target: whether the tokens are the example's target.

  Returns:
    {'caption': text, 'tokens': tokens} for a target, and the tokens for a prediction; as lists,
    since seqio's loggers abbreviate arrays.
  """
  tokens = np.asarray(tokens).tolist()
  if not is_target:
    return tokens
  return {'caption': example['inputs_pretokenized'].decode(), 'tokens': tokens}


@gin.configurable(module='parti_jax.t5x')
def openmoji_alignment(
  targets: Sequence[Mapping[str, Any]], predictions: Sequence, tokenizer: str | None = None
) -> dict[str, float]:
  """Measures by their pixels whether sampled pictures show what their captions request.

  `evaluation.openmoji.openmoji_judge` describes the measures, which `parti-jax evaluate` computes
  too. They are also computed for the tokenizer's reconstructions of the real pictures, the ceiling
  for any generator.

  Args:
    targets: results of `postprocess`, with captions of OpenMoji and the tokens of its pictures.
    predictions: image tokens of each example, [length] or [num_decodes, length].
    tokenizer: folder of the run or the exported model with the tokenizer of these tokens; None for
      the demo model.

  Returns:
    'name_top1', 'name_top5' and 'tone_right', in %, as means over all pictures. 'tone_right'
    includes only pictures whose name has tones, and is omitted if there are none. The same for the
    reconstructions, with the prefix 'reconstruction_'.

  Raises:
    UserError: the tokenizer can't be read, differs from the token cache's, or doesn't have one of
      the tokens; JAX has no CPU backend; or a caption is not OpenMoji's.
  """
  folder = str(tokenizer or text_to_image.DEMO_FOLDER)
  _check_tokenizer(folder)
  detokenizer = _detokenizer(folder)
  asked = [_asked(target['caption']) for target in targets]
  drawn = [np.atleast_2d(prediction).tolist() for prediction in predictions]
  real = [[target['tokens']] for target in targets]
  judge = _judge(detokenizer.config.image_size)
  generated = judge.judge(asked, _pictures(detokenizer, drawn, 'prediction'))
  reconstructed = judge.judge(asked, _pictures(detokenizer, real, 'target'))
  if reconstructed.name_top1.mean() < _LEAST_CEILING:
    logging.warning(
      'openmoji_alignment: few reconstructions of the real pictures are recognized; make sure that '
      'their tokens come from the tokenizer in %s (gin: openmoji_alignment.tokenizer)',
      folder,
    )
  return {**_in_percent(generated), **_in_percent(reconstructed, 'reconstruction_')}


@gin.configurable(module='parti_jax.t5x')
def log_likelihood(targets: Sequence[Mapping[str, Any]], scores: Sequence) -> dict[str, float]:
  """Averages the log likelihoods of the real image tokens, given their captions.

  Args:
    targets: results of `postprocess`.
    scores: the log likelihood, in nats, of all image tokens of each example, as t5x's
      `score_batch` returns it.

  Returns:
    'log_likelihood', the mean over examples, and 'log_likelihood_per_token'.
  """
  likelihoods = np.asarray(scores, np.float64)
  tokens = sum(len(target['tokens']) for target in targets)
  return {
    'log_likelihood': float(likelihoods.mean()),
    'log_likelihood_per_token': float(likelihoods.sum() / tokens),
  }


def _pictures(
  detokenizer: detokenizing.Detokenizer, tokens: list, what: str
) -> UInt8[np.ndarray, 'examples num_images height width 3']:
  """Decodes the pictures of each example; `what` names the tokens in messages."""
  flat = []
  for number, of_example in enumerate(tokens):
    for ids in of_example:
      try:
        flat.append(detokenizer.checked(ids))
      except UserError as error:
        raise UserError(
          f'{what} of example {number}: {error} (gin: openmoji_alignment.tokenizer)'
        ) from error
  images = detokenizer(np.stack(flat))
  return images.reshape(len(tokens), -1, *images.shape[1:])


def _in_percent(verdicts: openmoji_judge.Verdicts, prefix: str = '') -> dict[str, float]:
  rights = {'name_top1': verdicts.name_top1, 'name_top5': verdicts.name_top5}
  if verdicts.tone_judged.any():
    rights['tone_right'] = verdicts.tone_right[verdicts.tone_judged]
  return {prefix + name: 100 * float(right.mean()) for name, right in rights.items()}


def _check_tokenizer(folder: str) -> None:
  """Raises UserError if the configured token cache is another tokenizer's than the folder's."""
  if gin.get_bindings(token_cache.configured).get('path') is None:
    return
  cache = token_cache.configured()
  found = fingerprints.mismatches(
    fingerprints.named(cache.name, cache.info),
    fingerprints.named(folder, {'tokenizer': _tokenizer(folder).fingerprint}),
    {'tokenizer': 'set openmoji_alignment.tokenizer to the tokenizer of these tokens'},
  )
  if found:
    raise UserError(found[0])


@functools.cache
def _tokenizer(folder: str) -> frozen_tokenizer.FrozenTokenizer:
  return frozen_tokenizer.load(folder, _cpu())


@functools.cache
def _detokenizer(folder: str) -> detokenizing.Detokenizer:
  tokenizer = _tokenizer(folder)
  return detokenizing.Detokenizer(tokenizer.config, tokenizer.params, _cpu())


def _cpu() -> jax.Device:
  return checkpoints.host_device('openmoji_alignment decodes image tokens')


@functools.cache
def _judge(size: int) -> openmoji_judge.Judge:
  return openmoji_judge.Judge(openmoji.pictures(), size)


@functools.cache
def _of_caption() -> dict[str, openmoji.Picture]:
  return {picture.caption: picture for picture in openmoji.pictures()}


def _asked(caption: str) -> openmoji.Picture:
  try:
    return _of_caption()[caption]
  except KeyError:
    raise UserError(
      f'the caption {caption!r} is not from OpenMoji, which openmoji_alignment requires; use the '
      'task cached_tokens for other captions'
    ) from None
