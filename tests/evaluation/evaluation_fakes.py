"""A small made-up emoji set, and pipelines that draw it well or badly."""

import types

import numpy as np

from parti_jax.data.openmoji import Picture

SIZE = 8
TONES = ((), ('light',), ('dark',))
_TONE_SHADE = {(): 230, ('light',): 160, ('dark',): 60}


def picture(name, tones=(), split='train'):
  caption = f'{name}: {", ".join(tones)}' if tones else name
  return Picture(code=caption, name=name, tones=tones, caption=caption, split=split)


def small_set():
  """Twelve names with three tones (four miss 'dark' in training), six without, two validation."""
  pictures = []
  for index in range(12):
    for tones in TONES:
      unseen = index < 4 and tones == ('dark',)
      pictures.append(picture(f'toned {index}', tones,
                              'unseen_combinations' if unseen else 'train'))
  pictures += [picture(f'thing {index}') for index in range(6)]
  pictures += [picture(f'new {index}', split='validation') for index in range(2)]
  return pictures


def render(code, size=SIZE):
  """Draws a name as a pattern of its own, with an eighth of the picture in the tone's shade."""
  name, _, tones = code.partition(': ')
  image = np.random.default_rng([*name.encode()]).integers(0, 2, (size, size, 3)) * 200
  image[:1] = _TONE_SHADE[(tones,) if tones else ()]
  return image.astype(np.uint8)


class FakePipeline:
  """A pipeline that draws by `draw(caption, index of the image) -> uint8 [size, size, 3]`."""

  image_size = SIZE
  codebook_size = 16

  def __init__(self, draw):
    self.draw = draw
    self.generated = []
    self.settings = None

  def generate(self, prompts, num_images=4, seed=0, **settings):
    self.settings = settings
    self.generated.append(list(prompts))
    images = [[self.draw(prompt, index) for index in range(num_images)] for prompt in prompts]
    return types.SimpleNamespace(images=np.array(images, np.uint8))

  def reconstruct(self, images):
    return images

  def tokenize(self, images):
    """Gives code 1 to black values and code 3 to others: two codes of 16, in any picture."""
    return np.where(images.reshape(len(images), -1) == 0, 1, 3).astype(np.int32)
