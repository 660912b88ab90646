"""Captions of scenes: many phrasings, each true of the scene and sufficient to check a picture.

Every caption of a scene states the same facts: the kinds, their numbers, sizes other than medium,
the colors of kinds that come in several, the relation, and the ground unless it is white.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from parti_jax.data import openmoji_scenes
from parti_jax.data import openmoji_things
from parti_jax.data.openmoji_scenes import Group
from parti_jax.data.openmoji_scenes import INVERSE
from parti_jax.data.openmoji_scenes import Scene

NUMBERS = ('zero', 'one', 'two', 'three', 'four', 'five')
SIZE_WORDS = {'small': ('small', 'little', 'tiny'), 'big': ('big', 'large', 'huge')}
COLOR_WORDS = {'grey': ('grey', 'gray'), 'purple': ('purple', 'purple', 'violet')}
# Phrases for a relation of {a} to {b}.
RELATION_PHRASES = {
  'left of': ('{a} to the left of {b}', '{a} left of {b}', '{a} on the left of {b}'),
  'right of': ('{a} to the right of {b}', '{a} right of {b}', '{a} on the right of {b}'),
  'above': ('{a} above {b}', '{a} above {b}', '{a} over {b}'),
  'below': ('{a} below {b}', '{a} under {b}', '{a} beneath {b}'),
}
BETWEEN_TWO = '{a} between {b}'
BETWEEN = (
  '{a} between {b} and {c}',
  '{a} between {c} and {b}',
  '{b} and {c} with {a} between them',
)
JOINED = ('{a} and {b}', '{a} and {b}', '{a} together with {b}')
FRAMES = ('{}', '{}', '{}', '{}', 'a picture of {}', 'an image of {}', 'a drawing of {}')
GROUND_PHRASES = (
  '{things} on {ground}',
  '{things} on {ground}',
  '{things} against {ground}',
  '{things} on {color}',
  'on {ground}, {things}',
)
# The natural color of a kind is stated in this share of the phrases.
_NATURAL_COLOR_SHARE = 0.4
# Scenes that the digest covers, of each split.
_DIGESTED = 50

Pick = Callable[[Sequence[str]], str]


def captions_of(settings: openmoji_scenes.Settings, split: str, index: int) -> list[str]:
  """Returns the captions of a split's scene; all are different."""
  rng = np.random.default_rng([settings.seed, openmoji_scenes.SPLITS.index(split), index, 1])
  scene = settings.scene(split, index)
  found: dict[str, None] = {}
  while len(found) < settings.captions:
    found[caption(scene, rng)] = None
  return list(found)


def digest(settings: openmoji_scenes.Settings) -> str:
  """Returns a digest that changes when this version makes other scenes or captions."""
  found = hashlib.sha256(openmoji_things.list_digest().encode())
  for split in openmoji_scenes.SPLITS:
    for index in range(min(_DIGESTED, settings.count(split))):
      found.update(settings.scene(split, index).to_json().encode())
      found.update(repr(captions_of(settings, split, index)).encode())
  return found.hexdigest()


def caption(scene: Scene, rng: np.random.Generator) -> str:
  """Returns a caption of a scene, in one of its phrasings.

  Args:
    scene: the scene.
    rng: chooses the phrasing.
  """
  pick: Pick = lambda choices: choices[int(rng.integers(len(choices)))]
  if rng.random() < 0.1:
    frame = f'there {"is" if scene.groups[0].count == 1 else "are"} {{}}'
    text = frame.format(_things(scene, rng, pick, swap=False))
  else:
    text = pick(FRAMES).format(_things(scene, rng, pick, swap=rng.random() < 0.5))
  if scene.ground == 'white' and rng.random() < 0.85:
    return text
  color = pick(COLOR_WORDS.get(scene.ground, (scene.ground,)))
  ground = with_article(f'{color} background')
  return pick(GROUND_PHRASES).format(things=text, ground=ground, color=color)


def _things(scene: Scene, rng: np.random.Generator, pick: Pick, swap: bool) -> str:
  """Returns the things of a scene and their relation; `swap` names another thing first."""
  names = [_name(group, rng, pick) for group in scene.groups]
  if len(names) == 1:
    return names[0]
  a, b, c = (*names, '')[:3]
  if scene.relation == 'between':
    if not c:
      return BETWEEN_TWO.format(a=a, b=b)
    return pick(BETWEEN if swap else BETWEEN[:2]).format(a=a, b=b, c=c)
  if swap:
    a, b = b, a
  if scene.relation:
    relation = INVERSE[scene.relation] if swap else scene.relation
    return pick(RELATION_PHRASES[relation]).format(a=a, b=b)
  return pick(JOINED).format(a=a, b=b)


def _name(group: Group, rng: np.random.Generator, pick: Pick) -> str:
  """Returns a group with its number, size and color, such as 'two small red hearts'."""
  kind = openmoji_things.kinds()[group.kind]
  # The first noun is the usual one.
  nouns = kind.nouns[0] if rng.random() < 0.7 else kind.nouns[rng.integers(len(kind.nouns))]
  words = []
  if group.size != 'medium':
    words.append(pick(SIZE_WORDS[group.size]))
  if kind.varies or (group.color and rng.random() < _NATURAL_COLOR_SHARE):
    words.append(pick(COLOR_WORDS.get(group.color, (group.color,))))
  words.append(nouns[group.count > 1])
  if group.count == 1:
    return with_article(' '.join(words))
  number = NUMBERS[group.count] if rng.random() < 0.7 else str(group.count)
  return ' '.join([number, *words])


def with_article(words: str) -> str:
  """Puts 'a' or 'an' before words; none of ours begins with a vowel that is spoken otherwise."""
  return f'{"an" if words[0].lower() in "aeiou" else "a"} {words}'
