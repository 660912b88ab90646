"""A loaded model, which samples pictures for prompts."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import UInt8

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import adapters
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import image_tokenizers
from parti_jax.models import rankers
from parti_jax.sampling import adaptive
from parti_jax.sampling import batch_sizes
from parti_jax.sampling import decoding
from parti_jax.sampling import editing
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import parameters
from parti_jax.sampling import placement
from parti_jax.sampling import programs
from parti_jax.sampling import prompt_encoder
from parti_jax.sampling import prompt_weights as prompt_weights_lib
from parti_jax.sampling import ranking
from parti_jax.sampling import request
from parti_jax.sampling import results
from parti_jax.sampling import slots
from parti_jax.sampling import speculative
from parti_jax.sampling import upscaling

DEMO_FOLDER = pathlib.Path(__file__).parent.parent / 'demo'

# Maximum size of a batch's logits at all positions at once, in bytes.
_MOST_LOGITS_BYTES = 1 << 28
# Maximum number of pictures that the tokenizer encodes at once.
_TOKENIZER_BATCH = 64


class TextToImage:
  """A model that samples pictures for prompts.

  Attributes:
    model_name: name of the model, for the pictures' metadata.
    sampling: default settings of `generate`.
    weights: how the decoder's weights are held, a name in `sampling_settings.WEIGHTS`.
    cache: how sampling holds keys and values, a name in `sampling_settings.CACHES`.
    provenance: what the model folder says about the training.
    config: sizes of the generator.
    tokenizer: the image tokenizer's module.
    place: the devices that hold the parameters, on which programs run.
    generator_params: the generator's parameters there, a result of `parameters.for_sampling`.
    tokenizer_params: the image tokenizer's parameters there.
  """

  def __init__(
    self,
    model: model_folder.Model,
    model_name: str,
    mesh: jax.sharding.Mesh | None = None,
    rules=None,
    ranker: str | os.PathLike[str] | None = None,
    weights: str = 'float',
    cache: str = 'float',
    upscaler: str | os.PathLike[str] | None = None,
  ):
    """Puts a model on the devices.

    Args:
      model: the result of `model_folder.load`.
      model_name: any name.
      mesh: devices over which to shard parameters and batches; by default a single one.
      rules: logical axis rules for the mesh; by default those of `rules.logical_axis_rules`.
      ranker: folder of a ranker to use instead of the model's own.
      weights: an argument of `load`.
      cache: an argument of `load`.
      upscaler: folder of a super-resolution network to use instead of the model's own.

    Raises:
      UserError: if the mesh does not divide a parameter, the vocabulary, the ranker or the upscaler
        can't be read, the ranker would see the pictures stretched, or `weights` or `cache` is unknown.
    """
    self.weights = sampling_settings.check_weights(weights)
    self.cache = sampling_settings.check_cache(cache)
    self.model_name = model_name
    self.sampling = model.sampling
    self.provenance = model.provenance
    self.config = model.generator_config
    self.tokenizer = image_tokenizers.module(model.tokenizer_config)
    self.place = placement.Placement(mesh, rules)
    self._prompts = prompt_encoder.PromptEncoder(model.vocabulary_path, self.config, cache)
    self.generator_params = self.place.put(
      parameters.for_sampling(self.config, model.generator_params, weights),
      functools.partial(model_folder.abstract, 'generator', self.config),
      lambda shardings: parameters.shardings(self.config, shardings),
      **({'convert': parameters.quantized} if weights == 'int8' else {}),
    )
    self.tokenizer_params = self.place.put(
      model.tokenizer_params,
      functools.partial(model_folder.abstract, 'tokenizer', model.tokenizer_config),
    )
    self._parts = model.parts
    if ranker is not None:
      self.ranker = ranking.load(ranker, self.place)
      if self.ranker.preprocessing is None:
        rankers.check_shape(self.ranker.config, self.image_size)
    if upscaler is not None:
      self.upscaler = upscaling.load(upscaler, self.place)

  @functools.cached_property
  def ranker(self) -> ranking.Ranker | None:
    """Scores pictures by a text; None if there is no ranker. The model's is read when it is used."""
    part = self._parts.get('ranker')
    return part and ranking.of_part(part, self.provenance, self._prompts.vocabulary, self.place)

  @functools.cached_property
  def upscaler(self) -> upscaling.Upscaler | None:
    """Enlarges pictures; None if the model has no super-resolution. It is read when it is used."""
    part = self._parts.get('super_resolution')
    return part and upscaling.Upscaler(part.config, part.params, self.place)

  @property
  def image_size(self) -> image_sizes.ImageSize:
    """Height and width of the pictures, in pixels; one number for squares."""
    return self.tokenizer.config.image_size

  @property
  def codebook_size(self) -> int:
    """Number of codes in the codebook of image tokens."""
    return self.config.codebook_size

  @property
  def decoder_layers(self) -> int:
    """Number of layers of the image-token decoder."""
    return self.config.decoder_layers

  def generate(
    self,
    prompts: Sequence[str] | str,
    num_images: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    rank: bool = False,
    upscale: bool = False,
    first_index: Sequence[int] | int = 0,
    image: Any = None,
    mask: Any = None,
    keep: str | None = None,
    vary: float | None = None,
    best_of: int = 1,
    negative: str | None = None,
    prompt_weights: bool = False,
    **sampling,
  ) -> results.Result:
    """Samples pictures (Parti, section 2).

    The prompt, the seed, the picture's index and the settings determine a picture, together with what
    is edited; the rest of the batch and JAX's global settings don't matter. (Batches of another size
    may round differently in the last bit, which very rarely changes a token.)

    Args:
      prompts: a text, or several. Texts longer than the model's text length are truncated, with a
        warning that shows the rest.
      num_images: number of pictures for each prompt.
      seed: integer from 0 to 2³² − 1.
      batch_size: number of pictures to sample at once, to limit memory; by default chosen
        automatically.
      progress: whether to show a progress bar.
      rank: whether to sort the pictures of each prompt by the score of the model's ranker, best
        first.
      upscale: whether to enlarge the pictures with the model's super-resolution.
      first_index: index of the first picture of a prompt, at least 0; one number for all prompts,
        or one for each. The last picture's index is at most 2³¹ − 1. Pictures with the same index
        are sampled with the same noise, even if their prompts differ. To sample one picture for
        each of many prompts independently, use different indices.
      image: a picture to edit: the path of a file, a PIL image, or uint8 [height, width, 3]. Its
        central square, or largest area in the middle with the shape of the model's pictures, is
        resized to their size. It goes with one of the next three, which say which of its image tokens
        are kept; the others are sampled. What is kept is the tokens, so pixels next to new tokens may
        change where the tokenizer's decoder sees both.
      mask: what to redraw: the path of a file or a PIL image, in which it is transparent, or
        white if nothing is transparent; or bool, or uint8 from 128 on, [height, width]. It has the
        size of `image`. A token is kept if its whole patch lies outside.
      keep: the side and the share of the picture to keep, such as 'top:0.5'; the sides are those of
        `editing.SIDES`. A token is kept if its whole patch lies in this share.
      vary: share of the tokens to redraw, from 0 to 1, at random places of each picture.
      best_of: number of candidates to sample for each picture, of which the one is returned after
        which the model finds the kept tokens behind the first new one likeliest. Picture i of a prompt
        has the indices from first_index + i · best_of on.
      negative: a text for the pass without text of guidance, which pictures move away from instead of
        from the empty text.
      prompt_weights: whether the prompts have weights of words, such as '(red hat:1.5)', as
        `prompt_weights.parsed` reads them.
      **sampling: fields of SamplingSettings, such as `guidance_scale`, that replace the model's
        defaults; None keeps the default.

    Raises:
      UserError: if there is no prompt, a prompt is blank, or a value is invalid; the message names
        it. Also if the model lacks the ranker or the super-resolution that `rank` or `upscale`
        needs; if a picture or a mask can't be read; if `negative` is given without guidance,
        `best_of` without kept tokens after a hole, or `prompt_weights` to a decoder without
        cross-attention or with `cache` 'int8'; or if an edit, `negative` or `prompt_weights` is
        combined with settings that skip layers or passes or are speculative.
    """
    rank, upscale, progress = (
      checks.boolean(name, value)
      for name, value in (('rank', rank), ('upscale', upscale), ('progress', progress))
    )
    if rank:
      self._needed_ranker()
    if upscale:
      self._needed_upscaler()
    asked = self._asked(
      prompts,
      num_images,
      seed,
      first_index,
      (image, mask, keep, vary),
      best_of,
      negative,
      prompt_weights,
      sampling,
    )
    total = asked.index.size
    batch = self._batch_size(total, batch_size, asked.settings.guided)
    room = self._empty(total)
    result = self._result(asked, *self._sample(asked, batch, progress, room))
    if asked.best_of > 1:
      result = self._best(result, asked, batch)
    result = self.ranked(result) if rank else result
    return self.upscaled(result) if upscale else result

  def stream(
    self,
    prompts: Sequence[str] | str,
    num_images: int = 4,
    seed: int = 0,
    first_index: Sequence[int] | int = 0,
    image: Any = None,
    mask: Any = None,
    keep: str | None = None,
    vary: float | None = None,
    negative: str | None = None,
    prompt_weights: bool = False,
    **sampling,
  ) -> Iterator[results.Partial]:
    """Samples pictures like `generate`, and yields them after each row of image tokens.

    The last item has the result, with the pictures of `generate`. All pictures are one batch.
    Arguments are checked before this returns, and nothing is sampled before the first item is asked
    for.

    Args:
      prompts: an argument of `generate`, as are all others.
      num_images: number of pictures for each prompt.
      seed: integer from 0 to 2³² − 1.
      first_index: index of the first picture of a prompt.
      image: a picture to edit.
      mask: what to redraw.
      keep: the side and the share of the picture to keep.
      vary: share of the tokens to redraw.
      negative: a text for the pass without text of guidance.
      prompt_weights: whether the prompts have weights of words.
      **sampling: fields of SamplingSettings.

    Raises:
      UserError: as `generate` does, if the settings skip layers or passes or are speculative, or if
        there are too many pictures for one batch.
    """
    edited = (image, mask, keep, vary)
    asked = self._asked(
      prompts, num_images, seed, first_index, edited, 1, negative, prompt_weights, sampling
    )
    editing.check_settings(asked.settings, 'stream')
    total = asked.index.size
    if (most := self._batch_size(total, None, asked.settings.guided)) < total:
      raise UserError(
        f'{total} pictures are too many to stream at once; ask for at most {most}, or use generate'
      )
    return self._stream(asked)

  def _stream(self, asked: request.Request) -> Iterator[results.Partial]:
    """Yields what `stream` does."""
    rows, columns = self.config.grid
    shape, total = asked.index.shape, asked.index.size
    chosen = np.minimum(np.arange(self.place.divisible(total)), total - 1)
    steering, index = asked.steering(chosen), asked.index.reshape(-1)[chosen]
    carry = self.place.start(
      programs.begin,
      (self.generator_params,),
      (asked.texts[asked.rows(chosen)], steering),
      asked.sampling,
      config=self.config,
      prefix=asked.prefix,
    )
    tokens = np.zeros([len(chosen), self.config.image_length], np.int32)
    kept = None
    if steering.tokens is not None:
      tokens[:, : asked.prefix] = np.asarray(steering.tokens)[:, : asked.prefix]
      kept = np.where(np.asarray(steering.kept), np.asarray(steering.tokens), -1)
    for row in range(asked.prefix // columns, rows):
      start, end = row * columns, (row + 1) * columns
      carry, drawn = self.place.start(
        programs.advance,
        (self.generator_params,),
        (index, steering),
        carry,
        np.int32(start),
        np.uint32(asked.seed),
        asked.sampling,
        config=self.config,
        count=columns,
        length=decoding.cache_length(self.config, end),
      )
      tokens[:, start:end] = jax.device_get(drawn)
      images = self.place.run(
        slots.preview,
        (self.tokenizer_params,),
        (np.arange(len(chosen), dtype=np.int32), np.full(len(chosen), row + 1, np.int32)),
        tokens,
        kept,
        tokenizer=self.tokenizer,
        grid=(rows, columns),
      )
      pictures = images[:total].reshape(*shape, *images.shape[1:])
      there = tokens[:total].reshape(*shape, -1)[..., :end].copy()
      result = None if end < self.config.image_length else self._result(asked, there, pictures)
      yield results.Partial(pictures, there, row + 1, rows, result)

  def likelihood(
    self,
    prompts: Sequence[str] | str,
    images: Any,
    batch_size: int | None = None,
    prompt_weights: bool = False,
  ) -> Float32[np.ndarray, 'prompts images']:
    """Returns the mean log-likelihood of a token of each picture for each prompt.

    It is a mean over all tokens of a picture; `Result.likelihoods` is a sum over some of them.

    Args:
      prompts: a text, or several.
      images: a picture, in any form of `image` of `generate`, or several: a list of them, or uint8
        [images, height, width, 3].
      batch_size: number of pairs of a prompt and a picture to compute at once, to limit memory; by
        default chosen automatically.
      prompt_weights: an argument of `generate`.

    Returns:
      The mean over a picture's image tokens of log p(token | prompt, earlier tokens), in nats per
      token, without guidance, temperature and filters.

    Raises:
      UserError: if a prompt is blank, a picture can't be read, or a value is invalid.
    """
    prompts = checks.texts('prompt', prompts)
    weighted = checks.boolean('prompt_weights', prompt_weights)
    texts, text_weights = self._prompts.encode_weighted(prompts, weighted, 4)
    tokens = self.tokenize(editing.pictures(images, self.image_size))
    pairs = len(prompts) * len(tokens)
    found = self._log_likelihoods(
      texts,
      text_weights,
      np.arange(pairs) // len(tokens),
      np.broadcast_to(tokens, (len(prompts), *tokens.shape)).reshape(pairs, -1),
      self._batch_size(pairs, batch_size, False),
    )
    return found.mean(axis=1).reshape(len(prompts), len(tokens))

  def _log_likelihoods(
    self,
    texts: Int32[np.ndarray, 'prompts text_length'],
    text_weights: Float32[np.ndarray, 'prompts text_length'] | None,
    rows: np.ndarray,
    tokens: Int32[np.ndarray, 'pictures image_length'],
    batch: int,
  ) -> Float32[np.ndarray, 'pictures image_length']:
    """Returns the log-likelihood of each image token.

    Args:
      texts: text tokens of the prompts.
      text_weights: weight of each text token; None for 1.
      rows: the number of the prompt of each picture.
      tokens: the image tokens of each picture.
      batch: number of pictures to compute at once, at most.
    """
    logits_bytes = 4 * self.config.image_length * self.config.codebook_size
    batch = self.place.divisible(max(1, min(batch, _MOST_LOGITS_BYTES // logits_bytes)))
    found = np.empty(tokens.shape, np.float32)
    for start, chosen in placement.pieces(len(tokens), batch):
      weights = None if text_weights is None else text_weights[rows[chosen]]
      part = self.place.run(
        programs.log_likelihoods,
        (self.generator_params,),
        (texts[rows[chosen]], weights, tokens[chosen]),
        config=self.config,
        cache=self.cache,
      )
      found[start : start + batch] = part[: len(found) - start]
    return found

  def _asked(
    self,
    prompts,
    num_images,
    seed,
    first_index,
    edited,
    best_of,
    negative,
    prompt_weights,
    sampling,
  ) -> request.Request:
    """Checks arguments of `generate`, of which `edited` has image, mask, keep and vary."""
    prompts = checks.texts('prompt', prompts)
    num_images = checks.count('num_images', num_images)
    best_of = checks.count('best_of', best_of)
    seed = checks.whole_number('seed', seed, 0, sampling_settings.LARGEST_SEED)
    weighted = checks.boolean('prompt_weights', prompt_weights)
    settings = self.sampling.replace(**sampling)
    image, mask, keep, vary = edited
    edit = editing.edit(image, mask, keep, vary, self.image_size, self.config.grid)
    for name, used in (
      ('image', edit is not None),
      ('negative', negative is not None),
      ('prompt_weights', weighted),
    ):
      if used:
        editing.check_settings(settings, name)
    if best_of > 1 and edit is None:
      raise UserError(
        f'best_of={best_of} compares how candidates fit to kept tokens, and nothing is edited; '
        '`rank` sorts pictures by their prompts'
      )
    texts, text_weights = self._prompts.encode_weighted(prompts, weighted, 5)
    others = None
    if negative is not None:
      others = self._prompts.encode_negative(negative, settings)
    # Before the indices, which may be too many as well.
    batch_sizes.check_room(self.config, self.image_size, len(prompts) * num_images * best_of)
    first = placement.first_indices(first_index, len(prompts), num_images * best_of)
    index = first[:, None] + np.arange(num_images * best_of, dtype=np.int32)
    kept = edited_tokens = None
    if edit is not None:
      kept = edit.kept_tokens(seed, index, self.config.image_length)
      if best_of > 1 and not editing.after_hole(kept).any(axis=-1).all():
        raise UserError(
          f'best_of={best_of} compares how likely candidates make the kept tokens after the first new '
          f'one, and {edit.how} keeps none there; leave best_of out'
        )
      if kept.any():  # Otherwise these are the pictures without an edit.
        edited_tokens = self.tokenize(edit.image[None])[0]
    return request.Request(
      prompts=prompts,
      seed=seed,
      settings=settings,
      best_of=best_of,
      index=index,
      texts=texts,
      sampling=decoding.Sampling.of(settings, self.config.image_length, self.cache),
      negative=negative,
      weighted=weighted,
      edit=edit,
      prefix=0 if edit is None else edit.prefix(self.config.grid[1]),
      edited_tokens=edited_tokens,
      kept=kept,
      others=others,
      text_weights=text_weights,
    )

  def _result(
    self,
    asked: request.Request,
    tokens: Int32[np.ndarray, 'prompts candidates image_length'],
    images: UInt8[np.ndarray, 'prompts candidates height width 3'],
    usage: adaptive.Usage | None = None,
    passes: speculative.Passes | None = None,
  ) -> results.Result:
    """Returns what was sampled as a result."""
    return results.Result(
      images,
      tokens,
      asked.prompts,
      asked.seed,
      asked.settings,
      self.model_name,
      usage,
      passes,
      image_index=asked.index,
      weights=self.weights,
      cache=self.cache,
      edit=asked.edit,
      kept=asked.kept,
      best_of=asked.best_of,
      negative=asked.negative,
      prompt_weights=asked.weighted,
    )

  def _best(self, result: results.Result, asked: request.Request, batch: int) -> results.Result:
    """Returns the best candidate of each picture."""
    assert asked.kept is not None
    shape = asked.index.shape
    found = self._log_likelihoods(
      asked.texts,
      asked.text_weights,
      asked.rows(np.arange(asked.index.size)),
      result.tokens.reshape(asked.index.size, -1),
      batch,
    ).reshape(*shape, -1)
    total = np.where(editing.after_hole(asked.kept), found, 0.0).sum(axis=-1)
    of_picture = total.reshape(shape[0], -1, asked.best_of)
    first = np.arange(of_picture.shape[1]) * asked.best_of
    best = (first + np.argmax(of_picture, axis=-1)).astype(np.int32)
    return dataclasses.replace(result, likelihoods=total).chosen(best)

  def _sample(
    self, asked: request.Request, batch: int, progress: bool, room: tuple[np.ndarray, np.ndarray]
  ) -> tuple[
    Int32[np.ndarray, 'prompts num_images image_length'],
    UInt8[np.ndarray, 'prompts num_images height width 3'],
    adaptive.Usage | None,
    speculative.Passes | None,
  ]:
    """Samples pictures, one batch after another.

    Args:
      asked: the pictures to sample.
      batch: number of pictures in a batch.
      progress: whether to show a progress bar.
      room: arrays for the tokens and the pictures, a result of `_empty`.

    Returns:
      The image tokens, the pictures, what the tokens computed if the settings skip anything, and
      the passes they took if sampling is speculative.
    """
    shape, total, indices = asked.index.shape, asked.index.size, asked.index.reshape(-1)
    params = self.generator_params, self.tokenizer_params
    others = np.uint32(asked.seed), asked.sampling
    statics = {'config': self.config, 'tokenizer': self.tokenizer}
    tokens, images = room
    counts = []
    for start, chosen in placement.pieces(total, batch, progress):
      arrays = asked.texts[asked.rows(chosen)], indices[chosen]
      usage = passes = None
      if asked.steered:
        steering = asked.steering(chosen)
        drawn = self.place.run(
          programs.steer, params, (*arrays, steering), *others, prefix=asked.prefix, **statics
        )
      else:
        *drawn, usage, passes = self.place.run(
          programs.generate, params, arrays, *others, **statics
        )
      stop = min(start + batch, total)
      tokens[start:stop], images[start:stop] = (part[: stop - start] for part in drawn)
      counts.append(jax.tree.map(lambda part, count=stop - start: part[:count], (usage, passes)))
    usage, passes = jax.tree.map(
      lambda *parts: np.concatenate(parts).reshape(*shape, *parts[0].shape[1:]), *counts
    )
    return tokens.reshape(*shape, -1), images.reshape(*shape, *images.shape[1:]), usage, passes

  def ranked(self, result: results.Result) -> results.Result:
    """Sorts the pictures of each prompt by their scores, best first.

    Args:
      result: pictures of this model that are not ranked or upscaled, with their `image_index`.

    Raises:
      UserError: if the model has no ranker.
    """
    assert result.image_index is not None and result.upscaled is None
    shape = result.images.shape
    prompts = result.prompts
    if result.prompt_weights:
      prompts = prompt_weights_lib.plain(prompts)
    texts = [prompt for prompt in prompts for _ in range(shape[1])]
    images = result.images.reshape(-1, *shape[2:])
    scores = self._needed_ranker().scores(texts, images).reshape(shape[:2])
    order = np.argsort(-scores, axis=1, kind='stable').astype(np.int32)
    return dataclasses.replace(result, scores=scores).chosen(order)

  def upscaled(self, result: results.Result) -> results.Result:
    """Adds the pictures enlarged by the model's super-resolution.

    Raises:
      UserError: if the model has none.
    """
    shape = result.images.shape
    upscaled = self.upscale(result.images.reshape(-1, *shape[2:]))
    return dataclasses.replace(result, upscaled=upscaled.reshape(*shape[:2], *upscaled.shape[1:]))

  def tokenize(self, images) -> Int32[np.ndarray, 'images image_length']:
    """Encodes pictures to image tokens.

    Args:
      images: uint8 [images, height, width, 3], of the model's image size.

    Raises:
      UserError: if the shape or the dtype is wrong.
    """
    images = self._pictures(images)
    return self._through_tokenizer(
      images, programs.tokenize, np.empty([len(images), self.config.image_length], np.int32)
    )

  def reconstruct(self, images) -> UInt8[np.ndarray, 'images height width 3']:
    """Encodes pictures to image tokens and decodes these.

    The result is the best that a generator of the tokens can reach.

    Args:
      images: uint8 [images, height, width, 3], of the model's image size.

    Raises:
      UserError: if the shape or the dtype is wrong.
    """
    images = self._pictures(images)
    return self._through_tokenizer(images, programs.reconstruct, np.empty_like(images))

  def upscale(self, images) -> UInt8[np.ndarray, 'images height width 3']:
    """Enlarges pictures with the model's super-resolution (Parti, section 2.1).

    Args:
      images: uint8 [images, height, width, 3], of any size. The network was trained on
        reconstructions of the tokenizer, of the model's image size.

    Returns:
      The pictures, `upscaler.factor` times as high and wide.

    Raises:
      UserError: if the model has no super-resolution, or the shape or the dtype is wrong.
    """
    return self._needed_upscaler()(images)

  def _needed_ranker(self) -> ranking.Ranker:
    """Returns the ranker; raises UserError if there is none."""
    if self.ranker is None:
      raise UserError(
        f"the model {self.model_name} has no ranker, so it can't rank pictures; "
        '`parti-jax export --base=FOLDER --ranker=RUN` adds one, and --ranker=FOLDER uses another'
      )
    return self.ranker

  def _needed_upscaler(self) -> upscaling.Upscaler:
    """Returns the upscaler; raises UserError if there is none."""
    if self.upscaler is None:
      raise UserError(
        f"the model {self.model_name} has no super-resolution, so it can't enlarge pictures; "
        '`parti-jax export --base=FOLDER --super_resolution=RUN` adds it, and --upscaler=FOLDER uses '
        'another'
      )
    return self.upscaler

  def _pictures(self, images) -> UInt8[np.ndarray, 'images height width 3']:
    return images_lib.checked(images, self.image_size)

  def _empty(
    self, total: int
  ) -> tuple[
    Int32[np.ndarray, '{total} image_length'], UInt8[np.ndarray, '{total} height width 3']
  ]:
    """Returns uninitialized arrays for the tokens and pixels of pictures."""
    shape = total, *image_sizes.sides(self.image_size), 3
    return np.empty([total, self.config.image_length], np.int32), np.empty(shape, np.uint8)

  def _through_tokenizer(
    self,
    images: UInt8[np.ndarray, 'images height width 3'],
    function: Callable[..., Any],
    filled: np.ndarray,
  ) -> np.ndarray:
    """Fills an array with the results of a function of the tokenizer and pictures."""
    batch = self.place.divisible(min(_TOKENIZER_BATCH, max(len(images), 1)))
    for start, chosen in placement.pieces(len(images), batch, False):
      part = self.place.run(
        function, (self.tokenizer_params,), (images[chosen],), tokenizer=self.tokenizer
      )
      filled[start : start + batch] = part[: len(filled) - start]
    return filled

  def encode_prompts(self, prompts: Sequence[str]) -> Int32[np.ndarray, 'prompts text_length']:
    """Encodes prompts to text tokens.

    Args:
      prompts: texts; those longer than the model's text length are truncated, with a warning.

    Raises:
      UserError: if there is no prompt, or one is blank.
    """
    return self._prompts.encode(prompts, 4)

  def encode_negative(
    self, negative, settings: sampling_settings.SamplingSettings
  ) -> Int32[np.ndarray, 'text_length']:
    """Encodes the text of guidance's other side to text tokens.

    Args:
      negative: an argument of `generate`.
      settings: the settings with which to sample.

    Raises:
      UserError: if there is no guidance, or the text is blank.
    """
    return self._prompts.encode_negative(negative, settings)

  def left_out(self, prompt: str) -> str:
    """Returns the end of a prompt that `encode_prompts` leaves out; empty if all of it fits."""
    return self._prompts.left_out(prompt)

  def _batch_size(self, total: int, asked: int | None, guided: bool) -> int:
    return batch_sizes.batch_size(self.config, self.place, self.cache, total, asked, guided)


def load(
  path=None,
  mesh: jax.sharding.Mesh | None = None,
  rules=None,
  ranker=None,
  weights: str = 'float',
  cache: str = 'float',
  upscaler=None,
  lora: Sequence[str] | str = (),
) -> TextToImage:
  """Loads a model.

  Args:
    path: a model folder, as a path or a URL; None for the demo model in this package.
    mesh: devices over which to shard the model; by default a single one.
    rules: logical axis rules for the mesh; by default those of `rules.logical_axis_rules`.
    ranker: folder of a ranker to use instead of the model's own, as a path or a URL: a folder that
      `parti-jax import ranker` wrote, or a model folder.
    weights: 'float' holds the decoder's weights in float32 on a CPU and in bfloat16 elsewhere;
      'int8' rounds them to 8 bits.
    cache: 'float' holds the keys and values of the text and of earlier image tokens in the dtype of
      the decoder's computation; 'int8' rounds them to 8 bits.
    upscaler: folder of a super-resolution network to use instead of the model's own, as a path or a
      URL: a folder that `parti-jax import super_resolution` wrote, or a model folder.
    lora: file of adapters to add to the model that they were trained on, or several files, as paths
      or URLs; ':' and a factor may follow, such as 'pets.safetensors:0.5'.

  Raises:
    UserError: if a folder or file is missing, unfinished, damaged, or not what it should be, if
      adapters belong to another model, or if `weights` or `cache` is unknown.
  """
  sampling_settings.check_weights(weights)
  sampling_settings.check_cache(cache)
  path = None if path is None else checks.text('path', path)
  if path is not None and storage.is_url(path):
    model, name = model_folder.load(path), storage.name(path)
    model, name = adapters.with_adapters(model, lora, name)
    return TextToImage(model, name, mesh, rules, ranker, weights, cache, upscaler)
  folder = pathlib.Path(DEMO_FOLDER if path is None else path)
  if (folder / 'checkpoints').is_dir() and not (folder / model_folder.CONFIG_FILE).exists():
    raise UserError(
      f'{folder} holds the checkpoints of a training run; `parti-jax export` makes a model folder '
      'from them'
    )
  name = 'demo' if path is None else os.path.basename(os.path.abspath(folder))
  model, name = adapters.with_adapters(model_folder.load(folder), lora, name)
  return TextToImage(model, name, mesh, rules, ranker, weights, cache, upscaler)
