"""A small artificial emoji set, and pipelines that generate it well or badly."""

import contextlib
import types
import warnings

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data.openmoji import Picture
from parti_jax.evaluation.metrics import features
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import results

SIZE = 8
TONES = ((), ('light',), ('dark',))
_TONE_SHADE = {(): 230, ('light',): 160, ('dark',): 60}


def picture(name, tones=(), split='train'):
  caption = f'{name}: {", ".join(tones)}' if tones else name
  return Picture(code=caption, name=name, tones=tones, caption=caption, split=split)


def small_set():
  """Twelve names with three tones (four lack 'dark' in training), six without, two validation."""
  pictures = []
  for index in range(12):
    for tones in TONES:
      unseen = index < 4 and tones == ('dark',)
      pictures.append(
        picture(f'toned {index}', tones, 'unseen_combinations' if unseen else 'train')
      )
  pictures += [picture(f'thing {index}') for index in range(6)]
  pictures += [picture(f'new {index}', split='validation') for index in range(2)]
  return pictures


def render(code, size=SIZE):
  """Renders a unique pattern per name, with an eighth of the picture in the tone's shade."""
  name, _, tones = code.partition(': ')
  image = np.random.default_rng([*name.encode()]).integers(0, 2, (size, size, 3)) * 200
  image[:1] = _TONE_SHADE[(tones,) if tones else ()]
  return image.astype(np.uint8)


class FakeRanker:
  """A ranker whose picture features are the pixels' means, and text features those of `draw`."""

  config = types.SimpleNamespace(image_size=SIZE)
  preprocessing = name = file_format = None
  kind = 'coca'
  longest = 1000  # Characters of a text.

  def __init__(self, draw):
    self.draw = draw

  def image_features(self, images):
    assert images.shape[1:] == (SIZE, SIZE, 3) and images.dtype == np.uint8
    features = images.reshape(len(images), -1).astype(np.float32) + 1
    return features / np.linalg.norm(features, axis=1, keepdims=True)

  def scores(self, texts, images):
    return (self.text_features(texts) * self.image_features(images)).sum(axis=1)

  def encode(self, texts):
    return None, [text[self.longest :] for text in texts]

  def text_features(self, texts):
    return self.image_features(np.stack([self.draw(text, 0) for text in texts]))


class FakeInception:
  """Projects pixels to 3 features, 2 spatial ones and 4 logits."""

  name, image_size, resizes, digest = 'Inception', 299, True, 'ab' * 32

  def __init__(self, path, image_size, spatial, resize):
    assert image_size is None and spatial and resize == 'tensorflow1'

  def __call__(self, images):
    pixels = images.reshape(len(images), -1)
    weights = np.random.default_rng(7).normal(size=(pixels.shape[1], 9)) / 500
    found = (pixels @ weights).astype(np.float32)
    return features.Features(found[:, :3], found[:, 3:7], found[:, 7:])


class FakePipeline:
  """A pipeline that generates `draw(caption, index of the image) -> uint8 [size, size, 3]`."""

  image_size = SIZE
  codebook_size = 16
  model_name = 'fake'
  text_length = 1000
  config = types.SimpleNamespace()

  def __init__(self, draw, ranker=None):
    self.draw = draw
    self.ranker = ranker
    self.generated = []
    self.settings = None

  @contextlib.contextmanager
  def stopped_after(self, calls):
    """Interrupts the call of `generate` after so many, which has to end the block."""
    generate = self.generate

    def stopped(prompts, **settings):
      if len(self.generated) == calls:
        raise KeyboardInterrupt
      return generate(prompts, **settings)

    self.generate = stopped
    with pytest.raises(KeyboardInterrupt):
      yield
    self.generate = generate

  def generate(
    self, prompts, num_images=4, seed=0, rank=False, first_index=0, progress=False, **settings
  ):
    assert not rank or self.ranker is not None
    self.settings = settings
    self.generated.append(list(prompts))
    first = np.broadcast_to(first_index, len(prompts)).tolist()
    images = [
      [self.draw(prompt, start + index) for index in range(num_images)]
      for prompt, start in zip(prompts, first)
    ]
    sampling = sampling_settings.SamplingSettings().replace(
      **{name: value for name, value in settings.items() if name != 'batch_size'}
    )
    ranked = {}
    if rank:  # The last picture is the best.
      images = [row[::-1] for row in images]
      order = np.tile(np.arange(num_images)[::-1], (len(prompts), 1))
      ranked = {'scores': order.astype(np.float32), 'image_index': order}
    return results.Result(
      np.array(images, np.uint8),
      np.zeros((len(prompts), num_images, 4), np.int32),
      list(prompts),
      seed,
      sampling,
      self.model_name,
      **ranked,
    )

  def encode_prompts(self, prompts):
    """Warns like a model that reads `text_length` characters."""
    for row, prompt in enumerate(prompts):
      if not prompt.strip():
        raise UserError(f'prompt {row + 1} is empty')
      if len(prompt) > self.text_length:
        warnings.warn(f'prompt {row + 1} is longer', stacklevel=2)

  def reconstruct(self, images):
    return images

  def tokenize(self, images):
    """Returns code 1 for black values and code 3 for others: two codes of 16, in any picture."""
    return np.where(images.reshape(len(images), -1) == 0, 1, 3).astype(np.int32)
