"""From prompts to pictures: a loaded model and what can be done with it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core import checks
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import vocabulary as vocabulary_lib
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings as settings_lib
from parti_jax.models import vit_vqgan
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import detokenizing
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import parameters
from parti_jax.sampling import placement
from parti_jax.sampling import ranking
from parti_jax.sampling import upscaling

DEMO_FOLDER = pathlib.Path(__file__).parent.parent / 'demo'

# Images drawn at once: where more no longer makes a CPU faster, and twice that elsewhere.
_MOST_AT_ONCE = {'cpu': 32}
_MOST_AT_ONCE_ELSEWHERE = 64
# Bytes that the caches of a batch may take; with large models this is the tighter bound.
_MOST_CACHE_BYTES = 1 << 30
# Pictures that go through the tokenizer at once.
_TOKENIZER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Result:
  """Pictures, and what they were drawn from.

  Attributes:
    images: uint8 [prompts, num_images, height, width, 3].
    tokens: int32 [prompts, num_images, image_length], the image tokens they are made of.
    prompts: one for each row.
    seed: of the draws.
    settings: SamplingSettings.
    model: the model's name.
    usage: what the tokens took, an `adaptive.Usage` of numpy arrays [prompts, num_images,
      image_length, ...], where the settings skip something; else None.
    scores: float32 [prompts, num_images], how well each picture fits its prompt by the model's
      ranker, falling along each row; None where they were not ranked.
    image_index: int [prompts, num_images], the index that each picture was drawn with: where it
      stood before pictures were ranked, counted from `first_index`. None counts from 0.
    upscaled: uint8 [prompts, num_images, f · height, f · width, 3], the pictures enlarged by the
      model's super-resolution; None where that was not asked for. If there are any, these are the
      pictures that are shown and saved.
  """

  images: np.ndarray
  tokens: np.ndarray
  prompts: list[str]
  seed: int
  settings: settings_lib.SamplingSettings
  model: str
  usage: adaptive.Usage | None = None
  scores: np.ndarray | None = None
  image_index: np.ndarray | None = None
  upscaled: np.ndarray | None = None

  def pil(self):
    """PIL pictures, a list of `num_images` for each prompt."""
    return [[images_lib.to_pil(image) for image in row] for row in self._shown]

  def grid(self, display_size: int | None = None):
    """All pictures on one sheet, a labelled row for each prompt; see `images.grid`."""
    return images_lib.grid(self._shown, self.prompts, display_size)

  def save(self, folder) -> list[pathlib.Path]:
    """Writes a PNG for each picture, with its prompt, seed and settings as metadata.

    Ranked pictures also carry their rank from 1 and their score, and are named by the rank.

    Args:
      folder: made if it is not there.

    Returns:
      The files, in the order of the prompts and of the pictures of each.

    Raises:
      UserError: if nothing can be written there.
    """
    return [
      images_lib.save_picture(
        folder, image, self._metadata() | {'prompt': prompt} | self._place_in(row, column)
      )
      for row, prompt in enumerate(self.prompts)
      for column, image in enumerate(self._shown[row])
    ]

  def save_grid(self, folder, display_size: int | None = None) -> pathlib.Path:
    """Writes `grid` as a PNG and returns the file; arguments and errors as `save`."""
    metadata = self._metadata() | {'num_images': str(self.images.shape[1])}
    if self.scores is not None:
      metadata['order'] = 'ranked, best first'
    return images_lib.save_grid(folder, self.grid(display_size), self.prompts, metadata)

  @property
  def _shown(self) -> np.ndarray:
    return self.images if self.upscaled is None else self.upscaled

  def _place_in(self, row: int, column: int) -> dict[str, str]:
    """Metadata of one picture among those of its prompt."""
    index = column if self.image_index is None else self.image_index[row, column]
    if self.scores is None:
      return {'image_index': str(index)}
    digits = len(str(self.images.shape[1]))  # So that files stand in the order of their ranks.
    return {
      'image_index': str(index),
      'rank': f'{column + 1:0{digits}}',
      'score': f'{self.scores[row, column]:.4f}',
    }

  def _metadata(self) -> dict[str, str]:
    settings = {
      name: value if isinstance(value, str) else checks.number_text(value)
      for name, value in dataclasses.asdict(self.settings).items()
    }
    if self.upscaled is not None:
      settings['upscaled'] = str(self.upscaled.shape[2] // self.images.shape[2])
    return {'seed': str(self.seed), **settings, 'model': self.model}


class TextToImage:
  """A model that is ready to draw.

  Attributes:
    model_name: for the pictures' metadata.
    image_size: height and width of its pictures, in pixels.
    codebook_size: number of image tokens to choose from.
    sampling: its own SamplingSettings, used for what `generate` is not given.
    provenance: what its folder says about its training.
    ranker: judges pictures by a text, `ranking.Ranker`; None where the model has none.
    upscaler: enlarges pictures, `upscaling.Upscaler`; None where the model has no super-resolution.
  """

  def __init__(self, model: model_folder.Model, model_name: str, mesh=None, rules=None):
    """Puts a model on the devices.

    Args:
      model: of `model_folder.load`.
      model_name: any.
      mesh: devices to spread parameters and batches over; one device by default.
      rules: logical axis rules, with a mesh; those of `parti_jax.partitioning` by default.

    Raises:
      UserError: if the mesh does not divide a parameter, or the vocabulary can't be read.
    """
    self.model_name = model_name
    self.sampling = model.sampling
    self.provenance = model.provenance
    self._config = model.parti_config
    self._tokenizer = vit_vqgan.ViTVQGAN(model.tokenizer_config)
    self._place = placement.Placement(mesh, rules)
    self._vocabulary = vocabulary_lib.TextVocabulary(model.vocabulary_path)
    if self._vocabulary.size > self._config.text_vocabulary:
      raise UserError(
        f'{model.vocabulary_path} has {self._vocabulary.size} pieces, but the model knows '
        f'{self._config.text_vocabulary}; it is the vocabulary of another model'
      )
    self._parti_params = self._place.put(
      parameters.cut(self._config, model.parti_params),
      model_folder.abstract('parti', self._config),
      lambda shardings: parameters.shardings(self._config, shardings),
    )
    self._tokenizer_params = self._place.put(
      model.tokenizer_params, model_folder.abstract('tokenizer', model.tokenizer_config)
    )
    self.ranker = None
    if part := model.parts.get('ranker'):
      self.ranker = ranking.Ranker(part.config, part.params, self._vocabulary, self._place)
    self.upscaler = None
    if part := model.parts.get('super_resolution'):
      self.upscaler = upscaling.Upscaler(part.config, part.params, self._place)

  @property
  def image_size(self) -> int:
    return self._tokenizer.config.image_size

  @property
  def codebook_size(self) -> int:
    return self._config.codebook_size

  @property
  def decoder_layers(self) -> int:
    """Layers of the image-token decoder."""
    return self._config.decoder_layers

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
    """Draws pictures (Parti, section 2).

    A picture follows from its prompt, the seed, its index among the pictures of its prompt, and
    the settings; it is the same in any batch, and whatever JAX's settings of the process are.
    (Batches of another size may round differently in the last bit, which can tip a draw once in a
    great many.)

    Args:
      prompts: texts, or one text. Those longer than the model's text length are cut, with a
        warning that says what was left out.
      num_images: pictures for each prompt.
      seed: whole number from 0 to 2³² − 1.
      batch_size: pictures drawn at once, for the memory; chosen by default.
      progress: whether to show a bar.
      rank: whether to put the pictures of each prompt in order, best first, by the model's ranker.
      upscale: whether to enlarge the pictures by the model's super-resolution.
      first_index: index of a prompt's first picture, from 0, one for all prompts or for each its
        own. The last picture's index is at most 2³¹ − 1.
        Pictures of one index are drawn with the same noise, whatever their prompt; where many
        prompts get one picture each, other indices make them independent.
      **sampling: fields of SamplingSettings, `guidance_scale` and others, in place of the model's
        own; None leaves those.

    Returns:
      A Result.

    Raises:
      UserError: if there is no prompt or a blank one, or a value can't be; the message names it.
        If the pictures are to be ranked by a model without a ranker, or enlarged by one without
        super-resolution.
    """
    rank, upscale, progress = (
      checks.boolean(name, value)
      for name, value in (('rank', rank), ('upscale', upscale), ('progress', progress))
    )
    if rank and self.ranker is None:
      raise UserError(
        f'the model {self.model_name} has no ranker, so that pictures can not be '
        'ranked; `parti-jax export --base=FOLDER --ranker=RUN` adds one'
      )
    if upscale:
      self._check_upscaler()
    prompts = checks.texts('prompt', prompts)
    num_images = checks.count('num_images', num_images)
    seed = checks.whole_number('seed', seed, 0, settings_lib.LARGEST_SEED)
    settings = self.sampling.replace(**sampling)
    sampled = decoding.Sampling.of(settings, self._config.image_length)
    total = len(prompts) * num_images
    first = _first_indices(first_index, len(prompts), num_images)
    texts = self._encode(prompts)
    batch = self._batch_size(total, batch_size, settings.guided)
    tokens, images = self._empty(total)
    index = (first[:, None] + np.arange(num_images, dtype=np.int32)).reshape(-1)
    usages = []
    for start, chosen in placement.pieces(total, batch, progress):
      *drawn, usage = self._place.run(
        _generate,
        (self._parti_params, self._tokenizer_params),
        (texts[chosen // num_images], index[chosen]),
        np.uint32(seed),
        sampled,
        config=self._config,
        tokenizer=self._tokenizer,
      )
      stop = min(start + batch, total)
      tokens[start:stop], images[start:stop] = (part[: stop - start] for part in drawn)
      usages.append(jax.tree.map(lambda part, count=stop - start: part[:count], usage))
    shape = (len(prompts), num_images)
    usage = jax.tree.map(
      lambda *parts: np.concatenate(parts).reshape(*shape, *parts[0].shape[1:]), *usages
    )
    result = Result(
      images.reshape(*shape, *images.shape[1:]),
      tokens.reshape(*shape, -1),
      prompts,
      seed,
      settings,
      self.model_name,
      usage,
      image_index=index.reshape(shape),
    )
    result = self._ranked(result) if rank else result
    if not upscale:
      return result
    upscaled = self.upscale(result.images.reshape(images.shape))
    return dataclasses.replace(result, upscaled=upscaled.reshape(*shape, *upscaled.shape[1:]))

  def _ranked(self, result: Result) -> Result:
    """A result with the pictures of each prompt in the order of their scores."""
    shape = result.images.shape
    texts = [prompt for prompt in result.prompts for _ in range(shape[1])]
    scores = self.ranker.scores(texts, result.images.reshape(-1, *shape[2:])).reshape(shape[:2])
    order = np.argsort(-scores, axis=1, kind='stable')
    rows = np.arange(shape[0])[:, None]
    return dataclasses.replace(
      result,
      images=result.images[rows, order],
      tokens=result.tokens[rows, order],
      usage=jax.tree.map(lambda part: part[rows, order], result.usage),
      scores=scores[rows, order],
      image_index=result.image_index[rows, order],
    )

  def tokenize(self, images) -> np.ndarray:
    """Image tokens of pictures.

    Args:
      images: uint8 [n, height, width, 3], of the model's image size.

    Returns:
      int32 [n, image_length].

    Raises:
      UserError: if the pictures are of another shape or dtype.
    """
    images = self._pictures(images)
    return self._through_tokenizer(
      images, _tokenize, np.empty([len(images), self._config.image_length], np.int32)
    )

  def reconstruct(self, images) -> np.ndarray:
    """Pictures through the tokenizer and back: the best that its tokens can say.

    Arguments and errors as `tokenize`; returns uint8 of the pictures' shape.
    """
    images = self._pictures(images)
    return self._through_tokenizer(images, _reconstruct, np.empty_like(images))

  def upscale(self, images) -> np.ndarray:
    """Pictures enlarged by the model's super-resolution (Parti, section 2.1).

    Args:
      images: uint8 [n, height, width, 3], of any size; the network was trained on what the
        tokenizer makes of pictures, of the model's own image size.

    Returns:
      uint8 [n, f · height, f · width, 3].

    Raises:
      UserError: if the model has no super-resolution, or the pictures are of another shape or
        dtype.
    """
    self._check_upscaler()
    return self.upscaler(images)

  def _check_upscaler(self):
    if self.upscaler is None:
      raise UserError(
        f'the model {self.model_name} has no super-resolution, so that pictures can '
        'not be enlarged; `parti-jax export --base=FOLDER --super_resolution=RUN` '
        'adds it'
      )

  def _pictures(self, images) -> np.ndarray:
    return images_lib.checked(images, self.image_size)

  def _empty(self, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays for the tokens and pixels of pictures."""
    length, size = self._config.image_length, self.image_size
    if total * (4 * length + 3 * size**2) > _memory():
      raise UserError(
        f'{total:,} pictures do not fit into the memory; choose fewer num_images, or '
        'fewer prompts at once'
      )
    return np.empty([total, length], np.int32), np.empty([total, size, size, 3], np.uint8)

  def _through_tokenizer(self, images: np.ndarray, function, results: np.ndarray) -> np.ndarray:
    batch = self._place.divisible(min(_TOKENIZER_BATCH, max(len(images), 1)))
    for start, chosen in placement.pieces(len(images), batch, False):
      part = self._place.run(
        function, (self._tokenizer_params,), (images[chosen],), tokenizer=self._tokenizer
      )
      results[start : start + batch] = part[: len(results) - start]
    return results

  def _encode(self, prompts: list[str]) -> np.ndarray:
    """Text tokens of prompts: int32 [prompts, text_length]."""
    if not prompts:
      raise UserError('no prompt given')
    texts = np.empty([len(prompts), self._config.text_length], np.int32)
    for row, prompt in enumerate(prompts):
      texts[row], cut = self._vocabulary.encode(prompt, self._config.text_length)
      if texts[row, 0] == vocabulary_lib.EOS_ID:
        raise UserError(f'prompt {row + 1} is empty; say what the picture should show')
      if cut:
        warnings.warn(
          f'prompt {row + 1} is longer than the {self._config.text_length} text tokens of the '
          f'model; left out: {cut!r}',
          stacklevel=3,
        )
    return texts

  def _batch_size(self, total: int, asked: int | None, guided: bool) -> int:
    """How many images are drawn at once."""
    if asked is not None:
      return self._place.divisible(min(checks.count('batch_size', asked), total))
    config = self._config
    cache_bytes = (
      2
      * config.decoder_layers
      * config.image_length
      * config.width
      * config.compute_dtype.itemsize
      * (2 if guided else 1)
    )
    most = _MOST_AT_ONCE.get(jax.default_backend(), _MOST_AT_ONCE_ELSEWHERE)
    most = max(1, min(most, _MOST_CACHE_BYTES // cache_bytes))
    pieces = -(-total // most)
    even = -(-total // pieces)
    # Few different sizes, since each is compiled anew.
    return self._place.divisible(even if even <= 4 else min(most, -(-even // 4) * 4))


def load(path=None, mesh=None, rules=None) -> TextToImage:
  """Loads a model.

  Args:
    path: a model folder, a path or a URL; None for the demo model that comes with the package.
    mesh: devices to spread the model over; one device by default.
    rules: logical axis rules, with a mesh.

  Returns:
    A TextToImage.

  Raises:
    UserError: if the folder is missing, unfinished, or no model folder; see `model_folder.load`.
  """
  path = None if path is None else checks.text('path', path)
  if path is not None and storage.is_url(path):
    return TextToImage(model_folder.load(path), storage.name(path), mesh, rules)
  folder = pathlib.Path(DEMO_FOLDER if path is None else path)
  if (folder / 'checkpoints').is_dir() and not (folder / model_folder.CONFIG_FILE).exists():
    raise UserError(
      f'{folder} holds the checkpoints of a training run; turn them into a model '
      'folder with `parti-jax export` (see parti-jax export --help)'
    )
  name = 'demo' if path is None else os.path.basename(os.path.abspath(folder))
  return TextToImage(model_folder.load(folder), name, mesh, rules)


def _memory() -> float:
  """Bytes of the machine's memory; infinite where it is not known."""
  try:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except (AttributeError, ValueError, OSError):
    return float('inf')


def _first_indices(first_index, prompts: int, num_images: int) -> np.ndarray:
  """The index of each prompt's first picture, so that all indices are int32: int32 [prompts]."""
  most = 2**31 - num_images
  if getattr(first_index, 'ndim', 0) or (
    isinstance(first_index, Sequence) and not isinstance(first_index, (str, bytes))
  ):
    if len(first_index) != prompts:
      raise UserError(
        f'first_index has {len(first_index)} numbers for {prompts} prompts; give one '
        'number for all, or one for each'
      )
    found = [
      checks.whole_number(f'first_index[{row}]', index, 0, most)
      for row, index in enumerate(first_index)
    ]
  else:
    found = [checks.whole_number('first_index', first_index, 0, most)] * prompts
  return np.array(found, np.int32)


@functools.partial(jax.jit, static_argnames=('config', 'tokenizer'))
def _generate(
  parti_params,
  tokenizer_params,
  texts,
  image_index,
  seed,
  sampling: decoding.Sampling,
  *,
  config,
  tokenizer: nn.Module,
):
  """Text tokens to image tokens, pictures and, where something is skipped, an adaptive.Usage."""
  arguments = config, parti_params, texts, decoding.image_keys(seed, image_index), sampling
  if sampling.exit_threshold is None and sampling.skip_threshold is None:
    tokens, usage = decoding.sample_tokens(*arguments), None
  else:
    tokens, usage = adaptive.sample_tokens(*arguments)
  pixels = tokenizer.apply({'params': tokenizer_params}, tokens, method='detokenize')
  return tokens, detokenizing.to_bytes(pixels), usage


def _from_bytes(images):
  return images.astype(jnp.float32) / 255.0


@functools.partial(jax.jit, static_argnames='tokenizer')
def _tokenize(params, images, *, tokenizer: nn.Module):
  return tokenizer.apply({'params': params}, _from_bytes(images), method='tokenize')


@functools.partial(jax.jit, static_argnames='tokenizer')
def _reconstruct(params, images, *, tokenizer: nn.Module):
  pixels = tokenizer.apply({'params': params}, _from_bytes(images))['mean']
  return detokenizing.to_bytes(jnp.clip(vit_vqgan.to_pixels(pixels), 0.0, 1.0))
