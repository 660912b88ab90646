"""Captions of single OpenMoji pictures as people write them: other names, articles, free order.

A picture's usual caption is its name and its skin tones: "woman firefighter: dark skin tone". This
module adds phrasings such as "a dark-skinned female firefighter", and plain requests with other words
around the name (`openmoji_requests`). Other names come from the package `emoji`, which also has the
names in other languages. No two pictures share a caption, unless they share a name.

This module doesn't import TensorFlow.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.data import held_out_requests
from parti_jax.data import openmoji
from parti_jax.data import openmoji_colors
from parti_jax.data import openmoji_requests

ENGLISH = 'en'
_COLORS = 'red|orange|yellow|green|blue|purple|brown|black|white|pink|grey|light blue'
# Names that don't take an article, besides proper names: plurals, adjectives and others.
_NO_ARTICLE = re.compile(
  r'(?:men|women|people|hands|palms|locked|unlocked)\b.*|.*(?:[^su]s|\bup|\bdown|\bhair|\bfog|\bfire|\bice|\bbread|\bbacon|\bbutter|\bsalt|\bgarlic|\brice|'
  r'\bbroccoli|\bginger root|\bbeard|\bbald|\bmen|\bpeople|\bwomen|\bfeet|\bfish|\bhay|\bconfetti|'
  r'\bsushi|\bsake|\bmoney|\bmail|\bnight|\bnoon|-thirty|o\'clock|\bNO|\bOK|\bface in clouds)'
)
_NAME_FRAMES = (
  '{name}',
  '{name}',
  '{phrase}',
  '{phrase}',
  'a picture of {phrase}',
  'an emoji of {phrase}',
  'an image of {phrase}',
  'a drawing of {phrase}',
  'draw {phrase}',
  '{name} emoji',
)
# What people say with a name although the picture stays the same.
_LOOSE_SHARE = 0.3
_LOOSE = (
  'small {}',
  'big {}',
  'little {}',
  'cute {}',
  'nice {}',
  'simple {}',
  'single {}',
  'cartoon {}',
  'funny {}',
  'old {}',
  'pair of {}',
  'slice of {}',
  'piece of {}',
  'bit of {}',
  'cup of {}',
  'bunch of {}',
  "man's {}",
  "friend's {}",
)
# Of one tone, such as 'dark skin tone', which is 'dark' in short.
_TONE_FRAMES = (
  '{name}, {tone}',
  '{tone} {name}',
  '{name} with {tone}',
  '{phrase} with {tone}',
  '{phrase} with {short} skin',
  '{short}-skinned {name}',
  'a {short}-skinned {name}',
  'a picture of a {short}-skinned {name}',
)
# What a plain request for a picture with one tone is about.
_TONE_CORES = (
  '{phrase} with {tone}',
  '{phrase} with {short} skin',
  'a {short}-skinned {name}',
  'one {short}-skinned {name}',
)
_TONES_FRAMES = ('{name}, {tones}', '{name} with {tones}', '{phrase} with {tones}')


def captions(
  picture: openmoji.Picture,
  count: int,
  languages: Sequence[str] = (ENGLISH,),
  requests: float = 0.0,
) -> list[str]:
  """Returns different captions of a picture, the same ones each time.

  Args:
    picture: the picture.
    count: maximum number of captions; a picture with few phrasings has fewer.
    languages: codes of languages, such as 'en' or 'de'. The usual caption comes first if English is
      among them. In the other languages there is one caption each. A picture without a name in any
      of them has its usual caption.
    requests: share of the phrasings that are plain requests. Captions that contain one of
      `held_out_requests` are left out.

  Raises:
    UserError: a language is unknown, the package `emoji` is missing, or, with `requests`, the picture
      can't be rendered.
  """
  check_languages(languages)
  others = [language for language in languages if language != ENGLISH]
  found = dict.fromkeys([picture.caption] if ENGLISH in languages else ())
  for language in others:
    if name := _localized(language).get(_bare(picture.code)):
      found[name] = None
  rng = np.random.default_rng([*picture.code.encode()])
  for _ in range(20 * count if ENGLISH in languages else 0):
    if len(found) >= count:
      break
    if requests and rng.random() < requests:
      text = _request(picture, rng)
    else:
      text = _phrase(picture, rng)
    if text is not None and not (requests and held_out_requests.is_in(text, picture.name)):
      found[text] = None
  return list(found)[:count] or [picture.caption]


def check_languages(languages: Sequence[str]) -> None:
  """Raises UserError unless all languages are known; `captions` describes them."""
  if isinstance(languages, str) or not languages:
    raise UserError(f"openmoji.languages = {languages!r} must be a tuple such as ('en', 'de')")
  known = openmoji.import_data_package('emoji').LANGUAGES
  for language in languages:
    if language not in known:
      raise UserError(
        f'openmoji.languages: unknown language {language!r}; choose from {", ".join(known)}'
      )


@functools.cache
def names(name: str) -> tuple[str, ...]:
  """Returns a name and the other names that mean the same pictures, in English."""
  found = dict.fromkeys([name, *_aliases().get(name, ())])
  for known in list(found):
    if match := re.fullmatch(r'(wo)?man (?!and |with |in |\w+ing\b|\w+ hair\b)(.+)', known):
      found[f'{"fe" if match[1] else ""}male {match[2]}'] = None
    if match := re.fullmatch(rf'({_COLORS}) ([a-z]+)', known):
      found[f'{match[2]} in {match[1]}'] = found[f'{match[1]}-colored {match[2]}'] = None
  taken = _owners()
  return tuple(text for text in found if text == name or taken.get(text.casefold(), name) == name)


def _phrase(picture: openmoji.Picture, rng: np.random.Generator) -> str:
  """Returns a caption in one of the phrasings."""
  pick = lambda choices: choices[int(rng.integers(len(choices)))]
  name = pick(names(picture.name))
  if name[0].islower() and not picture.tones and rng.random() < _LOOSE_SHARE:
    name = pick(_LOOSE).format(name)
  values = {'name': name, 'phrase': _with_article(name, definite=rng.random() < 0.1)}
  if not picture.tones:
    return pick(_NAME_FRAMES).format(**values)
  if len(picture.tones) > 1:
    return pick(_TONES_FRAMES).format(tones=' and '.join(picture.tones), **values)
  (tone,) = picture.tones
  return pick(_TONE_FRAMES).format(tone=tone, short=tone.removesuffix(' skin tone'), **values)


def _request(picture: openmoji.Picture, rng: np.random.Generator) -> str | None:
  """Returns a plain request; None if its words happen to contain the name of another picture."""
  pick = lambda choices: choices[int(rng.integers(len(choices)))]
  name = pick(names(picture.name))
  phrase = _with_article(name, definite=rng.random() < 0.1)
  if not picture.tones:
    color = (
      '' if re.search(rf'\b(?:{_COLORS})\b', name) else openmoji_colors.main_color(picture.code)
    )
    article = phrase.removesuffix(name).strip()
    core = openmoji_requests.Core(name, article, name[0].islower(), color, picture.name)
  elif len(picture.tones) > 1:
    text = f'{phrase} with {" and ".join(picture.tones)}'
    core = openmoji_requests.Core(text, '', takes_words=False)
  else:
    (tone,) = picture.tones
    values = {'name': name, 'phrase': phrase, 'tone': tone}
    text = pick(_TONE_CORES).format(short=tone.removesuffix(' skin tone'), **values)
    core = openmoji_requests.Core(text, '', takes_words=False)
  return openmoji_requests.request(core, rng, lambda found: is_other_name(found, picture.name))


def is_other_name(words: Sequence[str], name: str = '') -> bool:
  """Returns whether successive words are a name, or its plural, of other pictures than `name`.

  Args:
    words: the result of `openmoji_requests.words`, or some of it.
    name: the picture's name; '' for any.
  """
  *first, last = words
  known = _names_by_words()
  found = (known.get((*first, word)) for word in _singulars(last))
  return any(owner is not None and (not name or owner != name) for owner in found)


def _singulars(word: str) -> set[str]:
  return {word, *(word.removesuffix(ending) for ending in ('s', 'es', "'s"))}


@functools.cache
def _names_by_words() -> Mapping[tuple[str, ...], str]:
  return {tuple(openmoji_requests.words(text)): name for text, name in _owners().items()}


def _with_article(name: str, definite: bool) -> str:
  """Puts an article before a name that takes one."""
  if not name[0].islower() or _NO_ARTICLE.fullmatch(name):
    return name
  if definite:
    return f'the {name}'
  return f'{"an" if re.match("[aeiou](?!ni|se)", name) else "a"} {name}'


@functools.cache
def _aliases() -> Mapping[str, tuple[str, ...]]:
  """Maps names to their other names in the package `emoji`, unless these are codes."""
  by_code = {_bare(picture.code): picture for picture in openmoji.pictures()}
  found: dict[str, dict[str, None]] = collections.defaultdict(dict)
  for characters, entry in openmoji.import_data_package('emoji').EMOJI_DATA.items():
    picture = by_code.get(_code(characters))
    if picture is None or picture.tones:
      continue
    for alias in entry.get('alias', ()):
      text = _spelled(alias)
      same = _letters(text) == _letters(picture.name)
      if not same and re.fullmatch('(flag for )?[A-Za-z][a-z ]{2,}', text):
        found[picture.name][text] = None
  return {name: tuple(aliases) for name, aliases in found.items()}


@functools.cache
def _owners() -> Mapping[str, str]:
  """Maps texts in lower case to the one name that they mean; '' if they mean several."""
  found: dict[str, str] = {}
  for name, aliases in _aliases().items():
    for alias in aliases:
      text = alias.casefold()
      found[text] = name if found.get(text, name) == name else ''
  return {**found, **{picture.name.casefold(): picture.name for picture in openmoji.pictures()}}


@functools.cache
def _localized(language: str) -> Mapping[str, str]:
  """Maps codes to full names in a language; only names that one picture has."""
  emoji = openmoji.import_data_package('emoji')
  emoji.config.load_language(language)
  named = {
    _code(characters): _spelled(entry[language])
    for characters, entry in emoji.EMOJI_DATA.items()
    if language in entry
  }
  codes = collections.defaultdict(set)
  for code, name in named.items():
    codes[name.casefold()].add(code)
  return {code: name for code, name in named.items() if len(codes[name.casefold()]) == 1}


def _spelled(name: str) -> str:
  return name.strip(':').replace('_', ' ').replace('\u2019', "'")


def _letters(text: str) -> str:
  return ''.join(filter(str.isalnum, text)).casefold()


def _code(characters: str) -> str:
  return _bare('-'.join(f'{ord(character):04X}' for character in characters))


def _bare(code: str) -> str:
  # U+FE0F only requests the color form; the two packages disagree on its position.
  return '-'.join(part for part in code.split('-') if part != 'FE0F')
