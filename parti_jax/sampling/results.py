"""What sampling returns: pictures with what they were sampled from, and their files."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import checks
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import adaptive
from parti_jax.sampling import editing
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import speculative


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
    edit: the picture that was edited, and how; None if none was.
    kept: which image tokens are those of the edited picture; None without `edit`.
    best_of: number of candidates of each picture.
    likelihoods: the sum of the log-likelihoods, in nats, of the kept tokens after the first one that
      was drawn, by which the best candidate was chosen; None if there was one candidate. Unlike
      `TextToImage.likelihood`, it is no mean and leaves out the tokens that were drawn.
    negative: the text on guidance's other side; None for the empty text.
    prompt_weights: whether the prompts have weights, as `prompt_weights.parsed` reads them.
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
  edit: editing.Edit | None = None
  kept: Bool[np.ndarray, 'prompts num_images image_length'] | None = None
  best_of: int = 1
  likelihoods: Float32[np.ndarray, 'prompts num_images'] | None = None
  negative: str | None = None
  prompt_weights: bool = False

  def pil(self) -> list[list[Image.Image]]:
    """Returns PIL images, a list of `num_images` for each prompt."""
    return [[images_lib.to_pil(image) for image in row] for row in self._shown]

  def grid(self, display_size: int | None = None) -> Image.Image:
    """Draws all pictures on a white sheet, with a labeled row for each prompt.

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

  def chosen(self, columns: Int32[np.ndarray, 'prompts chosen']) -> Result:
    """Returns the pictures in some columns of each prompt."""
    rows = np.arange(len(columns))[:, None]
    names = ('images', 'tokens', 'usage', 'passes', 'scores', 'image_index', 'kept', 'likelihoods')
    parts = {name: getattr(self, name) for name in names}
    return dataclasses.replace(self, **jax.tree.map(lambda part: part[rows, columns], parts))

  @property
  def _shown(self) -> UInt8[np.ndarray, 'prompts num_images height width 3']:
    return self.images if self.upscaled is None else self.upscaled

  def _place_in(self, row: int, column: int) -> dict[str, str]:
    """Returns the metadata of a picture that tell it from the others of its prompt."""
    index = column if self.image_index is None else self.image_index[row, column]
    place = {'image_index': str(index)}
    if self.kept is not None:
      place['kept_tokens'] = editing.kept_text(self.kept[row, column])
    if self.likelihoods is not None:
      place['likelihood_after_hole'] = f'{self.likelihoods[row, column]:.4f}'
    if self.scores is None:
      return place
    digits = len(str(self.images.shape[1]))  # Sorts the files by rank.
    return place | {
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
    if self.negative is not None:
      settings['negative'] = self.negative
    if self.prompt_weights:
      settings['prompt_weights'] = 'true'
    if self.edit is not None:
      settings |= self.edit.metadata()
    if self.best_of > 1:
      settings['best_of'] = str(self.best_of)
    if self.upscaled is not None:
      settings['upscaled'] = str(self.upscaled.shape[2] // self.images.shape[2])
    return {'seed': str(self.seed), **settings, 'model': self.model}


@dataclasses.dataclass(frozen=True)
class Partial:
  """Pictures whose first rows are sampled.

  Attributes:
    images: the pictures; below these rows they are blank, of the gray `slots.BLANK`, except for what
      they keep of an edited picture.
    tokens: the image tokens of these rows.
    rows: number of rows of image tokens that are there.
    of_rows: number of rows of image tokens of a whole picture.
    result: the result, once the pictures are complete; until then None.
  """

  images: UInt8[np.ndarray, 'prompts num_images height width 3']
  tokens: Int32[np.ndarray, 'prompts num_images _']
  rows: int
  of_rows: int
  result: Result | None = None
