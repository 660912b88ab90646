"""Captions of scenes, read back by a parser of their own."""

import re

import pytest

from parti_jax.data import openmoji_grammar as grammar
from parti_jax.data import openmoji_scenes as scenes
from parti_jax.data import openmoji_things as things

_NUMBERS = {
  **{word: number for number, word in enumerate(('a', 'two', 'three', 'four', 'five'), 1)},
  **{'an': 1, '2': 2, '3': 3, '4': 4, '5': 5},
}
_SIZES = {'small': 'small', 'little': 'small', 'tiny': 'small'} | dict.fromkeys(
  ('big', 'large', 'huge'), 'big'
)
_COLORS = {name: name for name in (*things.COLORS, 'grey')} | {'gray': 'grey', 'violet': 'purple'}
_RELATIONS = {
  'to the left of': 'left of',
  'on the left of': 'left of',
  'left of': 'left of',
  'to the right of': 'right of',
  'on the right of': 'right of',
  'right of': 'right of',
  'above': 'above',
  'over': 'above',
  'below': 'below',
  'under': 'below',
  'beneath': 'below',
}
_NOUNS = {
  noun: (kind.noun, plural)
  for kind in things.kinds().values()
  for pair in kind.nouns
  for plural, noun in reversed(list(enumerate(pair)))  # 'fish' is found as a singular.
}


def _group(text):
  """Reads 'two small red hearts' as (count, size, color or '', kind)."""
  number, *words = text.split(' ')
  count, size, color = _NUMBERS[number], 'medium', ''
  if number in ('a', 'an'):
    assert (number == 'an') == (words[0][0].lower() in 'aeiou'), text
  if words[0] in _SIZES:
    size = _SIZES[words.pop(0)]
  if words[0] in _COLORS:
    color = _COLORS[words.pop(0)]
  kind, plural = _NOUNS[' '.join(words)]
  assert bool(plural) == (count > 1) or kind == 'fish', text
  return count, size, color, kind


def _read(caption):
  """Reads a caption as (groups, relation, ground)."""
  ground = 'white'
  if found := re.fullmatch(r'on (an? \w+) background, (.*)', caption):
    article, caption = found.groups()
  elif found := re.fullmatch(r'(.*) (?:on|against) (an? \w+) background', caption):
    caption, article = found.groups()
  elif found := re.fullmatch(r'(.*) on (\w+)', caption):
    caption, article = found.groups()
  else:
    article = 'a white'
  ground = _COLORS[article.split(' ')[-1]]
  caption = re.sub(r'^(a picture of|an image of|a drawing of|there is|there are) ', '', caption)
  if found := re.fullmatch(r'(.*) and (.*) with (.*) between them', caption):
    return [found[3], found[1], found[2]], 'between', ground
  if found := re.fullmatch(r'(.*) between (.*?)(?: and (.*))?', caption):
    return [name for name in found.groups() if name], 'between', ground
  for words, relation in _RELATIONS.items():
    if found := re.fullmatch(f'(.*) {words} (.*)', caption):
      return [found[1], found[2]], relation, ground
  return re.split(' and | together with ', caption), '', ground


def _as_read(scene, groups):
  """Returns what a caption has to say of the groups; '' for a color that it may leave out."""
  found = []
  for group, (_, _, color, _) in zip(scene.groups, groups):
    stated = group.color if color or things.kinds()[group.kind].varies else ''
    found.append((group.count, group.size, stated, group.kind))
  return found


@pytest.mark.parametrize('split, count', [('train', 1500), *((s, 100) for s in scenes.UNSEEN)])
def test_captions_say_what_the_scene_shows(split, count):
  for index in range(count):
    scene = scenes.scene(split, index)
    texts = grammar.captions_of(scenes.Settings(), split, index)
    assert len(set(texts)) == len(texts) == 8
    for text in texts:
      names, relation, ground = _read(text)
      groups = [_group(name) for name in names]
      order = [group.kind for group in scene.groups]
      if relation in scenes.INVERSE and groups[0][-1] != order[0]:
        groups, relation = groups[::-1], scenes.INVERSE[relation]
      groups.sort(key=lambda group: order.index(group[-1]))
      if relation == 'between':
        assert _group(names[0])[-1] == order[0]
      assert (groups, relation, ground) == (
        _as_read(scene, groups),
        scene.relation,
        scene.ground,
      ), text


def test_all_phrases_occur():
  texts = ' | '.join(
    text for index in range(1500) for text in grammar.captions_of(scenes.Settings(), 'train', index)
  )
  words = [*_RELATIONS, *_SIZES, *_COLORS, 'between them', 'together with', 'against', 'there are']
  words += [
    'a picture of',
    'an image of',
    'a drawing of',
    ' 5 ',
    'five',
    '| on a',
    '| on an orange',
  ]
  words += [noun for noun, (kind, plural) in _NOUNS.items() if not plural]
  assert not [word for word in words if word not in texts]


def test_captions_depend_on_the_settings():
  few = grammar.captions_of(scenes.Settings(captions=3), 'train', 4)
  assert few == grammar.captions_of(scenes.Settings(), 'train', 4)[:3]
  assert few != grammar.captions_of(scenes.Settings(captions=3, seed=1), 'train', 4)
