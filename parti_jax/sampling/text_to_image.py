"""A loaded model, which samples pictures for prompts."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import checks
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import adapters
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import parameters
from parti_jax.sampling import placement
from parti_jax.sampling import programs
from parti_jax.sampling import ranking
from parti_jax.sampling import speculative
from parti_jax.sampling import upscaling

DEMO_FOLDER = pathlib.Path(__file__).parent.parent / 'demo'

# Maximum number of images in a batch. A larger batch isn't faster on a CPU.
_MOST_AT_ONCE = {'cpu': 32}
_MOST_AT_ONCE_ELSEWHERE = 64
# Maximum size of the caches of a batch, in bytes; the tighter bound for large models.
_MOST_CACHE_BYTES = 1 << 30
# Maximum number of pictures that the tokenizer encodes at once.
_TOKENIZER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Result:
  """Pictures, and what they were sampled from.

  Attributes:
    images: the pictures.
    tokens: their image tokens.
    prompts: the prompt of each row.
    seed: the seed.
    settings: the sampling settings.
    model: name of the model.
    usage: what the tokens computed, with NumPy arrays; None if the settings skip nothing.
    passes: how many passes of the decoder the pictures took, with NumPy arrays; None without
      speculative decoding.
    scores: the ranker's score of each picture for its prompt, in descending order in each row; None
      if the pictures were not ranked.
    image_index: the index that each picture was sampled with: its position before ranking, plus
      `first_index`. None counts from 0.
    upscaled: the pictures enlarged by the model's super-resolution, which are then shown and saved
      in place of `images`; None if they were not enlarged.
    weights: the model's `TextToImage.weights`.
    cache: the model's `TextToImage.cache`.
  """

  images: UInt8[np.ndarray, 'prompts num_images height width 3']
  tokens: Int32[np.ndarray, 'prompts num_images image_length']
  prompts: list[str]
  seed: int
  settings: sampling_settings.SamplingSettings
  model: str
  usage: adaptive.Usage | None = None
  passes: speculative.Passes | None = None
  scores: Float32[np.ndarray, 'prompts num_images'] | None = None
  image_index: Int32[np.ndarray, 'prompts num_images'] | None = None
  upscaled: UInt8[np.ndarray, 'prompts num_images _ _ 3'] | None = None
  weights: str = 'float'
  cache: str = 'float'

  def pil(self) -> list[list[Image.Image]]:
    """Returns PIL images, a list of `num_images` for each prompt."""
    return [[images_lib.to_pil(image) for image in row] for row in self._shown]

  def grid(self, display_size: int | None = None) -> Image.Image:
    """Draws all pictures on a white sheet, with a labelled row for each prompt.

    Args:
      display_size: height of a picture on the sheet, in pixels. The default is the multiple of its
        height that is nearest to 192 pixels, and at least its height.

    Raises:
      UserError: if the sheet would be too large for memory, or the size is invalid.
    """
    return images_lib.grid(self._shown, self.prompts, display_size)

  def save(self, folder) -> list[pathlib.Path]:
    """Writes a PNG for each picture, with its prompt, seed and settings as metadata.

    Ranked pictures also have their score and their rank, which counts from 1, and the rank is part
    of their name.

    Args:
      folder: the output folder, created if it does not exist.

    Returns:
      The paths of the files, in the order of the prompts and their pictures.

    Raises:
      UserError: if the folder can't be written.
    """
    return [
      images_lib.save_picture(folder, image, self.metadata(row, column))
      for row in range(len(self.prompts))
      for column, image in enumerate(self._shown[row])
    ]

  def png(self, row: int, column: int) -> bytes:
    """Returns the file that `save` writes for a picture: a PNG with metadata.

    Args:
      row: number of the prompt, from 0.
      column: number of the picture among those of its prompt, from 0.
    """
    return images_lib.png(self._shown[row, column], self.metadata(row, column))

  def metadata(self, row: int, column: int) -> dict[str, str]:
    """Returns the metadata in the file of a picture, in which the arguments are those of `png`."""
    return self._metadata() | {'prompt': self.prompts[row]} | self._place_in(row, column)

  def save_grid(self, folder, display_size: int | None = None) -> pathlib.Path:
    """Writes the result of `grid` as a PNG to a folder and returns the path of the file."""
    metadata = self._metadata() | {'num_images': str(self.images.shape[1])}
    if self.scores is not None:
      metadata['order'] = 'ranked, best first'
    return images_lib.save_grid(folder, self.grid(display_size), self.prompts, metadata)

  @property
  def _shown(self) -> UInt8[np.ndarray, 'prompts num_images height width 3']:
    return self.images if self.upscaled is None else self.upscaled

  def _place_in(self, row: int, column: int) -> dict[str, str]:
    """Returns the metadata of a picture that tell it from the others of its prompt."""
    index = column if self.image_index is None else self.image_index[row, column]
    if self.scores is None:
      return {'image_index': str(index)}
    digits = len(str(self.images.shape[1]))  # Sorts the files by rank.
    return {
      'image_index': str(index),
      'rank': f'{column + 1:0{digits}}',
      'score': f'{self.scores[row, column]:.4f}',
    }

  def _metadata(self) -> dict[str, str]:
    settings = {
      name: value if isinstance(value, str) else checks.number_text(value)
      for name, value in dataclasses.asdict(self.settings).items()
      if self.settings.speculative_window or not name.startswith('speculative_')
    }
    for name in ('weights', 'cache'):
      if getattr(self, name) != 'float':
        settings[name] = getattr(self, name)
    if self.upscaled is not None:
      settings['upscaled'] = str(self.upscaled.shape[2] // self.images.shape[2])
    return {'seed': str(self.seed), **settings, 'model': self.model}


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
        can't be read, or `weights` or `cache` is unknown.
    """
    self.weights = sampling_settings.check_weights(weights)
    self.cache = sampling_settings.check_cache(cache)
    self.model_name = model_name
    self.sampling = model.sampling
    self.provenance = model.provenance
    self.config = model.generator_config
    self.tokenizer = image_tokenizers.module(model.tokenizer_config)
    self.place = placement.Placement(mesh, rules)
    self._vocabulary = text_tokenizer.open_tokenizer(model.vocabulary_path)
    if self._vocabulary.size > self.config.text_vocabulary:
      raise UserError(
        f'{model.vocabulary_path} has {self._vocabulary.size} pieces, but the model knows '
        f'{self.config.text_vocabulary}; it belongs to another model'
      )
    generators.check_empty_text(
      self.config,
      self._vocabulary.encode('', max(self.config.text_length, 3))[0],
      str(model.vocabulary_path),
    )
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
    if upscaler is not None:
      self.upscaler = upscaling.load(upscaler, self.place)

  @functools.cached_property
  def ranker(self) -> ranking.Ranker | None:
    """Scores pictures by a text; None if there is no ranker. The model's is read when it is used."""
    part = self._parts.get('ranker')
    return part and ranking.of_part(part, self.provenance, self._vocabulary, self.place)

  @functools.cached_property
  def upscaler(self) -> upscaling.Upscaler | None:
    """Enlarges pictures; None if the model has no super-resolution. It is read when it is used."""
    part = self._parts.get('super_resolution')
    return part and upscaling.Upscaler(part.config, part.params, self.place)

  @property
  def image_size(self) -> int:
    """Height and width of the pictures, in pixels."""
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
    **sampling,
  ) -> Result:
    """Samples pictures (Parti, section 2).

    The prompt, the seed, the picture's index and the settings determine a picture; the rest of the
    batch and JAX's global settings don't matter. (Batches of another size may round differently in
    the last bit, which very rarely changes a token.)

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
      **sampling: fields of SamplingSettings, such as `guidance_scale`, that replace the model's
        defaults; None keeps the default.

    Raises:
      UserError: if there is no prompt, a prompt is blank, or a value is invalid; the message names
        it. Also if the model lacks the ranker or the super-resolution that `rank` or `upscale`
        needs.
    """
    rank, upscale, progress = (
      checks.boolean(name, value)
      for name, value in (('rank', rank), ('upscale', upscale), ('progress', progress))
    )
    if rank:
      self._needed_ranker()
    if upscale:
      self._needed_upscaler()
    prompts = checks.texts('prompt', prompts)
    num_images = checks.count('num_images', num_images)
    seed = checks.whole_number('seed', seed, 0, sampling_settings.LARGEST_SEED)
    settings = self.sampling.replace(**sampling)
    sampled = decoding.Sampling.of(settings, self.config.image_length, self.cache)
    total = len(prompts) * num_images
    first = placement.first_indices(first_index, len(prompts), num_images)
    texts = self.encode_prompts(prompts)
    batch = self._batch_size(total, batch_size, settings.guided)
    # Before the indices, which may be too many as well.
    room = self._empty(total)
    index = first[:, None] + np.arange(num_images, dtype=np.int32)
    tokens, images, usage, passes = self._sample(texts, index, seed, sampled, batch, progress, room)
    result = Result(
      images,
      tokens,
      prompts,
      seed,
      settings,
      self.model_name,
      usage,
      passes,
      image_index=index,
      weights=self.weights,
      cache=self.cache,
    )
    result = self.ranked(result) if rank else result
    return self.upscaled(result) if upscale else result

  def _sample(
    self,
    texts: Int32[np.ndarray, 'prompts text_length'],
    index: Int32[np.ndarray, 'prompts num_images'],
    seed: int,
    sampling: decoding.Sampling,
    batch: int,
    progress: bool,
    room: tuple[np.ndarray, np.ndarray],
  ) -> tuple[
    Int32[np.ndarray, 'prompts num_images image_length'],
    UInt8[np.ndarray, 'prompts num_images height width 3'],
    adaptive.Usage | None,
    speculative.Passes | None,
  ]:
    """Samples pictures for encoded prompts, one batch after another.

    Args:
      texts: text tokens of the prompts.
      index: the index of each picture among those of its prompt.
      seed: the seed of all pictures.
      sampling: how to sample.
      batch: number of pictures in a batch.
      progress: whether to show a progress bar.
      room: arrays for the tokens and the pictures, a result of `_empty`.

    Returns:
      The image tokens, the pictures, what the tokens computed if the settings skip anything, and
      the passes they took if sampling is speculative.
    """
    shape, total, indices = index.shape, index.size, index.reshape(-1)
    tokens, images = room
    counts = []
    for start, chosen in placement.pieces(total, batch, progress):
      *drawn, usage, passes = self.place.run(
        programs.generate,
        (self.generator_params, self.tokenizer_params),
        (texts[chosen // shape[1]], indices[chosen]),
        np.uint32(seed),
        sampling,
        config=self.config,
        tokenizer=self.tokenizer,
      )
      stop = min(start + batch, total)
      tokens[start:stop], images[start:stop] = (part[: stop - start] for part in drawn)
      counts.append(jax.tree.map(lambda part, count=stop - start: part[:count], (usage, passes)))
    usage, passes = jax.tree.map(
      lambda *parts: np.concatenate(parts).reshape(*shape, *parts[0].shape[1:]), *counts
    )
    return tokens.reshape(*shape, -1), images.reshape(*shape, *images.shape[1:]), usage, passes

  def ranked(self, result: Result) -> Result:
    """Sorts the pictures of each prompt by their scores, best first.

    Args:
      result: pictures of this model that are not ranked or upscaled, with their `image_index`.

    Raises:
      UserError: if the model has no ranker.
    """
    assert result.image_index is not None and result.upscaled is None
    shape = result.images.shape
    texts = [prompt for prompt in result.prompts for _ in range(shape[1])]
    images = result.images.reshape(-1, *shape[2:])
    scores = self._needed_ranker().scores(texts, images).reshape(shape[:2])
    order = np.argsort(-scores, axis=1, kind='stable')
    rows = np.arange(shape[0])[:, None]
    return dataclasses.replace(
      result,
      images=result.images[rows, order],
      tokens=result.tokens[rows, order],
      usage=jax.tree.map(lambda part: part[rows, order], result.usage),
      passes=jax.tree.map(lambda part: part[rows, order], result.passes),
      scores=scores[rows, order],
      image_index=result.image_index[rows, order],
    )

  def upscaled(self, result: Result) -> Result:
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
    """Returns uninitialised arrays for the tokens and pixels of pictures."""
    length, size = self.config.image_length, self.image_size
    if total * (4 * length + 3 * size**2) > _memory():
      raise UserError(
        f'{total:,} pictures do not fit into memory; choose a smaller num_images, or fewer '
        'prompts at once'
      )
    return np.empty([total, length], np.int32), np.empty([total, size, size, 3], np.uint8)

  def _through_tokenizer(
    self,
    images: UInt8[np.ndarray, 'images height width 3'],
    function: Callable[..., Any],
    results: np.ndarray,
  ) -> np.ndarray:
    """Fills `results` with the results of a function of the tokenizer and pictures."""
    batch = self.place.divisible(min(_TOKENIZER_BATCH, max(len(images), 1)))
    for start, chosen in placement.pieces(len(images), batch, False):
      part = self.place.run(
        function, (self.tokenizer_params,), (images[chosen],), tokenizer=self.tokenizer
      )
      results[start : start + batch] = part[: len(results) - start]
    return results

  def encode_prompts(self, prompts: Sequence[str]) -> Int32[np.ndarray, 'prompts text_length']:
    """Encodes prompts to text tokens.

    Args:
      prompts: texts; those longer than the model's text length are truncated, with a warning.

    Raises:
      UserError: if there is no prompt, or one is blank.
    """
    if not prompts:
      raise UserError('no prompt given')
    texts = np.empty([len(prompts), self.config.text_length], np.int32)
    for row, prompt in enumerate(prompts):
      texts[row], cut = self._vocabulary.encode(prompt, self.config.text_length)
      if self._vocabulary.is_empty(texts[row]):
        raise UserError(f'prompt {row + 1} is empty; say what the picture should show')
      if cut:
        warnings.warn(
          f'prompt {row + 1} is longer than the {self.config.text_length} text tokens of the '
          f'model; left out: {cut!r}',
          stacklevel=3,
        )
    return texts

  def left_out(self, prompt: str) -> str:
    """Returns the end of a prompt that `encode_prompts` leaves out; empty if all of it fits."""
    return self._vocabulary.encode(prompt, self.config.text_length)[1]

  def _batch_size(self, total: int, asked: int | None, guided: bool) -> int:
    """Returns the number of images to sample at once."""
    if asked is not None:
      return self.place.divisible(min(checks.count('batch_size', asked), total))
    config = self.config
    cache_bytes = (
      2
      * config.decoder_layers
      * config.image_length
      * config.cached_heads
      * config.head_dim
      * (1 if self.cache == 'int8' else config.compute_dtype.itemsize)
      * (2 if guided else 1)
    )
    most = _MOST_AT_ONCE.get(jax.default_backend(), _MOST_AT_ONCE_ELSEWHERE)
    most = max(1, min(most, _MOST_CACHE_BYTES // cache_bytes))
    pieces = -(-total // most)
    even = -(-total // pieces)
    # Few different sizes, since each is compiled separately.
    return self.place.divisible(even if even <= 4 else min(most, -(-even // 4) * 4))


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


def _memory() -> float:
  """Returns the size of the machine's memory in bytes; infinity if it is unknown."""
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError, OSError):
    return float('inf')
