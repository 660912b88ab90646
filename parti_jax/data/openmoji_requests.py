"""A grammar of plain requests: words that people put around the name of a picture.

"please draw a shiny wooden spoon on the kitchen table in the morning" asks for the same picture as
"spoon". The words around the name come from lists: how a request begins, whose thing it is, what it
is like and made of, where and when it is, what it is for. They leave the picture as it is, so they
state no color, no number above one and no place next to another thing, and none of them is a name of
a picture.

This module doesn't import TensorFlow.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar('T')

OPENINGS = tuple(
  """a picture of|an image of|a drawing of|a sketch of|a painting of|an illustration of|a sticker of
  |a pictogram of|a symbol of|an icon of|a cartoon of|a poster of|a logo of|a graphic of|a doodle of
  |a simple picture of|a nice drawing of|a small image of|a quick sketch of|an emoji of
  |draw|please draw|draw me|can you draw|could you draw|i want you to draw|now draw|just draw
  |paint|please paint|paint me|sketch|make|please make|make me|create|generate|design|show|show me
  |please show me|let me see|i want|i want to see|i would like|i'd like|i need|we need|give me
  |imagine|think of|here is|this is|that is|look at|there is|i found|i like|i love|i bought|we saw
  |he has|she has|they have|we have|my friend has|my favorite thing is|it is""".replace(
    '\n  ', ''
  ).split('|')
)
OWNERS = tuple(
  """my|your|our|his|her|their|my sister's|my brother's|my friend's|my mother's|my father's|my uncle's
  |my aunt's|my neighbor's|our neighbor's|the boss's|anna's|tom's|maria's|ahmed's|mei's
  |somebody's|everyone's|nobody's|the owner's|a stranger's|a tourist's|the visitor's|a customer's
  |the collector's""".replace('\n  ', '').split('|')
)
QUALITIES = tuple(
  """small|little|tiny|mini|miniature|big|large|huge|giant|enormous|tall|short|long|wide|narrow|thin
  |thick|heavy|round|simple|plain|basic|classic|modern|old-fashioned|antique|vintage|ancient|used|worn
  |dusty|dirty|clean|polished|smooth|rough|soft|pretty|beautiful|lovely|cute|nice|fancy|elegant
  |stylish|charming|ugly|odd|strange|weird|unusual|rare|common|ordinary|typical|normal|regular
  |standard|famous|popular|local|foreign|exotic|traditional|european|african|asian|american|nordic
  |tropical|rural|urban|cheap|expensive|precious|valuable|fine|perfect|great|good|excellent
  |wonderful|amazing|fantastic|interesting|boring|mysterious|forgotten|lost|hidden|real
  |realistic|imaginary|fictional|detailed|minimalist|abstract|decorative|handmade|homemade|custom
  |original|official|genuine|fake|proper|whole|single|solitary|lonely|quiet|peaceful
  |comical|silly|neat|tidy|sturdy|delicate|tender""".replace('\n  ', '').split('|')
)
MATERIALS = tuple(
  """cardboard|plastic|rubber|ceramic|porcelain|marble|granite|concrete|copper|bronze|steel|iron|tin
  |aluminum|leather|cotton|woolen|velvet|silk|linen|felt|knitted|embroidered|carved|painted|printed
  |inflatable|wax|clay|plaster|cork|oak|straw|enamel|chrome""".replace('\n  ', '').split('|')
)
# Feelings; not for names that have an expression, such as faces.
MOODS = tuple(
  """cheerful|joyful|proud|brave|shy|calm|gentle|curious|clever|lazy|busy|nervous|grumpy|gloomy
  |serious|patient|polite|excited|bored|content|hopeful|jolly|merry|moody|thoughtful
  |dreamy|confident|humble|noble""".replace('\n  ', '').split('|')
)
_PLACES = {
  'on': """the table|a table|the kitchen table|a shelf|the shelf|the counter|the floor|the ground
  |the carpet|a rug|the lawn|wet grass|the sidewalk|the street|a country road|the porch|the balcony
  |the terrace|a rooftop|the stage|a pedestal|a sandy shore|the shore|the hillside
  |an island far away|the pier|a platform|the patio|a blanket|a tray|the doorstep|the windowsill
  |the workbench|the desk|my street|a greeting card|the cover of a magazine|a wall
  |a billboard|display|the other side|vacation""",
  'in': """the park|a park|the yard|the backyard|the forest|a meadow|the valley|the hills
  |the countryside|the village|a small village|the city|a big city|the suburbs|the town|town
  |the alley|the harbor|the port|the attic|the basement|the garage|the kitchen|the living room
  |the bedroom|the hallway|the classroom|the library|the workshop|the studio|the waiting room
  |a shop|the supermarket|the museum|a gallery|a warehouse|the laboratory|the lobby
  |the shade|the wild|the open|the mud|the dust|paris|london|rome|berlin|madrid|lisbon
  |vienna|prague|amsterdam|brussels|dublin|oslo|stockholm|helsinki|athens|istanbul|cairo|nairobi|lagos
  |cape town|mumbai|delhi|beijing|shanghai|tokyo|kyoto|seoul|bangkok|sydney|melbourne|toronto|montreal
  |chicago|boston|seattle|san francisco|texas|california|florida|buenos aires
  |lima|bogota|havana|moscow|warsaw|the alps|the andes|the far north|southern europe
  |a faraway land|a fairytale|a comic|a children's story|my dreams|the distance|the foreground
  |the center|the middle|someone's garden|a box|a drawer|a display case|a suitcase""",
  'at': """the market|a flea market|the fair|the zoo|the airport|work
  |home|the seaside|the riverside|the lakeside|the campsite|the gym|a party|a picnic|a concert
  |an exhibition|the entrance|the exit|the corner|the reception|the counter|the border
  |the edge of town|my grandparents' place|a friend's place""",
  'from': """above|the side|behind|up close|far away|the past|the future|the old days|my childhood
  |another planet|overseas|abroad|the countryside|a catalog|a museum|a shop|the market
  |a story|a legend|a documentary|an album|last summer""",
}
PLACES = tuple(
  f'{preposition} {place}'
  for preposition, places in _PLACES.items()
  for place in places.replace('\n  ', '').split('|')
)
TIMES = tuple(
  """in the morning|in the early morning|in the afternoon|in the evening|late in the evening|at dawn
  |at dusk|at midday|after midnight|after dinner|after work|before breakfast
  |before lunch|during the day|during the week|during the holidays|all day|every day|all year
  |in spring|in summer|in autumn|in winter|in january|in february|in march|in april|in may|in june
  |in july|in august|in september|in october|in november|in december|on monday|on tuesday
  |on wednesday|on thursday|on friday|on saturday|on the weekend|on a weekday|on a holiday
  |on a bright day|on a dull day|on a windy day|on a warm day|on a chilly day|on a lazy afternoon
  |in bright weather|in bad weather|in the eighties|in the nineties|in the last century
  |in ancient times|in the middle ages|long ago|yesterday|today|tomorrow|last week|last year
  |next week|some day|once upon a time|as we speak""".replace('\n  ', '').split('|')
)
PURPOSES = tuple(
  """for me|for you|for us|for my friend|for my mother|for my father|for my sister|for my brother
  |for my neighbor|for the kids|for the children|for the team|for everyone|for a party
  |for a lesson|for a presentation|for a project|for homework|for a website|for an app
  |for a menu|for a sign|for a flyer|for a leaflet|for a report|for a game|for a quiz
  |for a story|for a poem|for the hallway|for the kitchen|for the classroom
  |for work|for fun|for a laugh|for decoration|for practice|for later|for sale
  |for the weekend|for the summer|for a journey|as a present to myself|as a sticker
  |as an icon|as a logo|as a pictogram|as a decoration|as an example|as a reminder|as a joke
  |as usual|to go with my text|to hang up|to print|to color in|to share|to explain something
  |to decorate my room""".replace('\n  ', '').split('|')
)
CLAUSES = tuple(
  """that i saw yesterday|that i saw last week|that i like|that i remember|that i miss|that we found
  |that we bought|that nobody wants|that everyone knows|that everyone likes|that my friend likes
  |that looks nice|that looks real|that looks old|that looks funny|that looks great|that looks odd
  |that is easy to draw|that is easy to recognize|that is very old|that is very small|that is very big
  |that is worth a lot|that belongs to me|that belongs to nobody|that has seen better days
  |that makes me laugh|that made our day|which is rare|which is popular|which i never use
  |which i use every day|which surprised us|i once had|i have always wanted|you would like
  |seen from the front|seen from afar|shown alone
  |in a simple style|in a comic style|in a flat style|in clear lines|with thick lines|with thin lines
  |with clear outlines|with few details|with lots of detail|without anything else|without any text
  |all by itself|all alone|in full view|and nothing else|and that is all""".replace(
    '\n  ', ''
  ).split('|')
)
CLOSINGS = ('please', 'thanks', 'thank you', 'if you can', 'nothing else', 'in good quality')

# Half of the words before a name are general, and the other half are materials and feelings.
_BEFORE = (QUALITIES, QUALITIES, MATERIALS, MOODS)
_OF_EXPRESSIVE = (QUALITIES,)
_AFTER = (PLACES, TIMES, PURPOSES, CLAUSES)
_WORD = re.compile(r"[a-z0-9']+")
_HAS_EXPRESSION = re.compile(
  r'\b(?:face|faces|cat|monkey|person|people|man|men|woman|women|boy|girl|baby|child|kiss|couple|'
  r'heart|hand|hands|finger|skull|emoji)\b'
)
# The most words of a name, at which windows of words end.
_LONGEST_NAME = 6


@dataclasses.dataclass(frozen=True)
class Core:
  """What a request is about, without the words around it.

  Attributes:
    text: the name, such as 'spoon', or a name with its tone, such as 'dark-skinned man'.
    article: 'a', 'an', 'the' or '' before the text as it is.
    takes_words: whether an owner, a quality or a material may stand before the text.
  """

  text: str
  article: str
  takes_words: bool


def words(text: str) -> list[str]:
  """Returns the words of a text in lower case, without punctuation."""
  return _WORD.findall(text.casefold())


def request(
  core: Core, rng: np.random.Generator, is_name: Callable[[Sequence[str]], bool]
) -> str | None:
  """Returns a request in random words.

  Args:
    core: what it is about.
    rng: source of the choices.
    is_name: whether successive words are a name of another picture.

  Returns:
    The request; None if its words happen to contain the name of another picture, as "old man" does
    for "man".
  """
  before = _pick(OPENINGS, rng) if rng.random() < 0.6 else ''
  qualities = _qualities(core, rng) if core.takes_words else []
  article = _article(core, qualities, rng)
  after = [_pick(choices, rng) for choices in _lists_after(rng)]
  if rng.random() < 0.1:
    after.append(_pick(CLOSINGS, rng))
  if not (before or qualities or after):
    return None
  head = ' '.join(filter(None, [before, article, *qualities]))
  if _contains_name(words(head), words(core.text), words(' '.join(after)), is_name):
    return None
  return ' '.join(filter(None, [head, core.text, *after]))


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
  return choices[int(rng.random() * len(choices))]


def _qualities(core: Core, rng: np.random.Generator) -> list[str]:
  """Draws up to two words that stand before a name."""
  draw = rng.random()
  count = 0 if draw < 0.3 else 1 if draw < 0.8 else 2
  kinds = _OF_EXPRESSIVE if _HAS_EXPRESSION.search(core.text) else _BEFORE
  return list(dict.fromkeys(_pick(_pick(kinds, rng), rng) for _ in range(count)))


def _article(core: Core, qualities: list[str], rng: np.random.Generator) -> str:
  """Returns what stands before the qualities and the name."""
  if not core.takes_words:
    return core.article
  draw = rng.random()
  if draw < 0.15:
    return _pick(OWNERS, rng)
  if not core.article or draw < 0.3:  # As in "spoon on the table" and "tiny spoon".
    return ''
  if not qualities or core.article == 'the':
    return core.article
  return 'an' if qualities[0][0] in 'aeiou' and qualities[0] not in ('used', 'european') else 'a'


def _lists_after(rng: np.random.Generator) -> list[Sequence[str]]:
  """Draws the lists that the words after a name come from: none, one or two."""
  draw = rng.random()
  count = 0 if draw < 0.2 else 1 if draw < 0.7 else 2
  found = {int(rng.random() * len(_AFTER)) for _ in range(count)}
  return [_AFTER[index] for index in sorted(found)]


def _contains_name(
  before: list[str],
  core: list[str],
  after: list[str],
  is_name: Callable[[Sequence[str]], bool],
) -> bool:
  """Returns whether words around a name are another name together with words of it."""
  text = before + core + after
  first, end = len(before), len(before) + len(core)
  # The lists alone have no names, as tests check: only those that words of both form are looked for.
  for start in range(max(0, first - _LONGEST_NAME + 1), end):
    least = first if start < first else end
    for stop in range(least + 1, min(start + _LONGEST_NAME, len(text)) + 1):
      if is_name(text[start:stop]):
        return True
  return False


def phrases() -> Iterator[str]:
  """Yields all entries of the lists."""
  yield from itertools.chain(OPENINGS, OWNERS, QUALITIES, MATERIALS, MOODS, *_AFTER, CLOSINGS)


def could_make(text: str, core: str) -> bool:
  """Returns whether the grammar could make a text about `core`, for any seed.

  Args:
    text: the text, in lower case.
    core: a name that occurs in it.
  """
  before, _, after = text.partition(core)
  return _are_from(before.split(), _heads()) and _are_from(after.split(), _tails())


def _heads() -> frozenset[tuple[str, ...]]:
  singles = (*OPENINGS, *OWNERS, *QUALITIES, *MATERIALS, *MOODS, 'a', 'an', 'the')
  return frozenset(tuple(entry.split()) for entry in singles)


def _tails() -> frozenset[tuple[str, ...]]:
  return frozenset(tuple(entry.split()) for entry in itertools.chain(CLOSINGS, *_AFTER))


def _are_from(found: Sequence[str], entries: Collection[tuple[str, ...]]) -> bool:
  """Returns whether words are a sequence of entries."""
  if not found:
    return True
  return any(
    tuple(found[:length]) in entries and _are_from(found[length:], entries)
    for length in range(1, len(found) + 1)
  )
