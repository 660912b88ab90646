"""Metrics of our tasks for seqio's evaluator, in t5x's `infer_eval` and `t5x.eval`.

t5x has them computed by its first process alone, in a thread beside the training. So the tokenizer
stays on the CPU, and it is read without the other processes.
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

from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import token_cache
from parti_jax.evaluation.openmoji import openmoji_judge
from parti_jax.sampling import detokenizing
from parti_jax.sampling import text_to_image
from parti_jax.t5x import checkpoints
from parti_jax.training.objectives import frozen_tokenizer

# Share of the real pictures that should be known again from their tokens; the demo's are 98%.
_LEAST_CEILING = 0.5


def postprocess(tokens: Sequence, example: Mapping[str, Any], is_target: bool = False):
  """Turns what seqio has decoded into what the metrics of this module take.

  Args:
    tokens: image tokens [length], or [num_decodes, length] where several were drawn.
    example: of the task, with its caption as 'inputs_pretokenized'.
    is_target: whether the tokens are the example's own.

  Returns:
    {'caption': text, 'tokens': tokens} of a target, and the tokens of a prediction; as lists,
    since seqio's loggers write arrays in part.
  """
  tokens = np.asarray(tokens).tolist()
  if not is_target:
    return tokens
  return {'caption': example['inputs_pretokenized'].decode(), 'tokens': tokens}


@gin.configurable(module='parti_jax.t5x')
def openmoji_alignment(
  targets: Sequence[Mapping[str, Any]], predictions: Sequence, tokenizer: str | None = None
) -> dict[str, float]:
  """Whether drawn pictures show what was asked for, judged by their pixels.

  What the judge asks is in `evaluation.openmoji_judge`; `parti-jax evaluate` asks the same. The
  real pictures, through the tokenizer, are judged too: no generator can do better.

  Args:
    targets: of `postprocess`; captions of OpenMoji, and the image tokens of its pictures.
    predictions: of each example image tokens [length], or [num_decodes, length].
    tokenizer: folder of the run or of the exported model whose tokens they are; None for the demo
      model.

  Returns:
    'name_top1', 'name_top5' and 'tone_right', in %, means over all pictures (of 'tone_right' those
    whose name has tones; left out where none has), and the same of the real pictures through the
    tokenizer behind 'reconstruction_'.

  Raises:
    UserError: the tokenizer can't be read, or is not the one of the token cache; JAX knows no CPU,
      tokens are not its, or captions are not OpenMoji's.
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
      'openmoji_alignment: the real pictures are hardly known again from their image tokens; was '
      '%s the tokenizer that made them? (gin: openmoji_alignment.tokenizer)',
      folder,
    )
  return {**_in_percent(generated), **_in_percent(reconstructed, 'reconstruction_')}


@gin.configurable(module='parti_jax.t5x')
def log_likelihood(targets: Sequence[Mapping[str, Any]], scores: Sequence) -> dict[str, float]:
  """How likely the model finds the real image tokens, given their captions.

  Args:
    targets: of `postprocess`.
    scores: of each example the log likelihood, in nats, of all its image tokens, as t5x's
      `score_batch` gives it.

  Returns:
    'log_likelihood', the mean over examples, and 'log_likelihood_per_token'.
  """
  scores = np.asarray(scores, np.float64)
  tokens = sum(len(target['tokens']) for target in targets)
  return {
    'log_likelihood': float(scores.mean()),
    'log_likelihood_per_token': float(scores.sum() / tokens),
  }


def _pictures(detokenizer: detokenizing.Detokenizer, tokens: list, what: str) -> np.ndarray:
  """Pictures, uint8 [examples, num_images, height, width, 3], of tokens of each example."""
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
  """Raises UserError if the token cache is known and of another tokenizer than the folder's."""
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
  return checkpoints.host_device('openmoji_alignment turns tokens into pictures')


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
      f'{caption!r} is no caption of OpenMoji, whose pictures are judged here; for '
      'others use the task cached_tokens'
    ) from None
