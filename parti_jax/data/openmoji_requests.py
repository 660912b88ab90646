"""A grammar of plain requests: words that people put around the name of a picture.

"please draw a shiny wooden spoon on the kitchen table in the morning" asks for the same picture as
"spoon". The words around the name come from lists: how a request begins, whose thing it is, what it
is like and made of, where and when it is, what it is for. They leave the picture as it is, so they
state no number above one, and no color but that of the picture.

A share of the words distracts: they occur in the names of other pictures ("a smiling spoon", "a
birthday spoon"), or are such names ("the cook's spoon", "a spoon for the cat", "a spoon next to a
lamp"). The request still asks for the noun that these words describe, and that alone. The lists of
`phrases` contain no name of a picture.

So that a model also ignores words that it has never read, the longest lists have thousands of words
(the folder request_words), and some words are invented ("a drovish spoon from malquen").

This module doesn't import TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from parti_jax.data import openmoji_colors

T = TypeVar('T')


def _entries(text: str) -> tuple[str, ...]:
  """Splits a list that is written with '|' between its entries, on lines indented by two."""
  return tuple(text.replace('\n  ', '').split('|'))


def _listed(name: str) -> tuple[str, ...]:
  """Reads a list of the folder request_words, which has one entry on each line."""
  path = pathlib.Path(__file__).with_name('request_words') / f'{name}.txt'
  return tuple(path.read_text(encoding='utf-8').splitlines())


OPENINGS = _entries(
  """a picture of|an image of|a drawing of|a sketch of|a painting of|an illustration of|a sticker of
  |a pictogram of|a symbol of|an icon of|a cartoon of|a poster of|a logo of|a graphic of|a doodle of
  |a simple picture of|a nice drawing of|a small image of|a quick sketch of|an emoji of
  |draw|please draw|draw me|can you draw|could you draw|i want you to draw|now draw|just draw
  |paint|please paint|paint me|sketch|make|please make|make me|create|generate|design|show|show me
  |please show me|let me see|i want|i want to see|i would like|i'd like|i need|we need|give me
  |imagine|think of|here is|this is|that is|look at|there is|i found|i like|i love|i bought|we saw
  |he has|she has|they have|we have|my friend has|my favorite thing is|it is"""
) + _listed('openings')
OWNERS = _entries(
  """my|your|our|his|her|their|my sister's|my brother's|my friend's|my mother's|my father's|my uncle's
  |my aunt's|my neighbor's|our neighbor's|the boss's|anna's|tom's|maria's|ahmed's|mei's
  |somebody's|everyone's|nobody's|the owner's|a stranger's|a tourist's|the visitor's|a customer's
  |the collector's"""
)
QUALITIES = _entries(
  """small|little|tiny|mini|miniature|big|large|huge|giant|enormous|tall|short|long|wide|narrow|thin
  |thick|heavy|round|simple|plain|basic|classic|modern|old-fashioned|antique|vintage|ancient|used|worn
  |dusty|dirty|clean|polished|smooth|rough|soft|pretty|beautiful|lovely|cute|nice|fancy|elegant
  |stylish|charming|ugly|odd|strange|weird|unusual|rare|common|ordinary|typical|normal|regular
  |standard|famous|popular|local|foreign|exotic|traditional|european|african|asian|american|nordic
  |tropical|rural|urban|cheap|expensive|precious|valuable|fine|perfect|great|good|excellent
  |wonderful|amazing|fantastic|interesting|boring|mysterious|forgotten|lost|hidden|real
  |realistic|imaginary|fictional|detailed|minimalist|abstract|decorative|handmade|homemade|custom
  |original|official|genuine|fake|proper|whole|single|solitary|lonely|quiet|peaceful
  |comical|silly|neat|tidy|sturdy|delicate|tender"""
)
MATERIALS = _entries(
  """cardboard|plastic|rubber|ceramic|porcelain|marble|granite|concrete|copper|bronze|steel|iron|tin
  |aluminum|leather|cotton|woolen|velvet|silk|linen|felt|knitted|embroidered|carved|painted|printed
  |inflatable|wax|clay|plaster|cork|oak|straw|enamel|chrome"""
)
# Feelings; not for names that have an expression, such as faces.
MOODS = _entries(
  """cheerful|joyful|proud|brave|shy|calm|gentle|curious|clever|lazy|busy|nervous|grumpy|gloomy
  |serious|patient|polite|excited|bored|content|hopeful|jolly|merry|moody|thoughtful
  |dreamy|confident|humble|noble"""
)
# Words that other names have, too. "Crying" alone doesn't make a face.
TRAITS = _entries(
  """smiling|laughing|grinning|winking|crying|worried|confused|surprised|disappointed|tired|weary
  |frowning|pouting|kissing|screaming|anxious|sad|annoyed|astonished|relieved|dizzy|evil|wild-eyed
  |flying|running|walking|dancing|swimming|rolling|jumping|sleeping|shaking|bouncing|floating|sliding
  |speaking|singing|shooting|falling|rising|waving|playing|growing|fluttering|melting|steaming
  |burning|exploding|glowing|sparkling|revolving|flashing|levitating|spinning|dashing|racing|speeding
  |broken|cracked|closed|open|full|empty|half-full|crossed|raised|folded|curved|bent|tilted|upside-down
  |stuffed|roasted|cooked|fried|baked|grilled|frozen|cold|warm|steamy|wet|dry|sweet|sour|salty|spicy
  |bitter|fresh|raw|sliced|peeled|shaved|canned|hairy|curly|bald|bearded|blond|feathered|leafy|wilted
  |thorny|poisonous|heavy-duty|high-speed|motorized|manual|mechanical|automatic|nuclear|solar|digital
  |magnetic|medical|musical|military|martial|royal|national|international|political|industrial
  |historical|classical greek|olympic|professional|amateur|young|older|adult|newborn|pregnant|deaf
  |blind|sick|injured|healthy|strong|weak|masked|disguised|framed|wrapped-up|rolled-up|hollow
  |last|first|outdoor|underground|aerial|polar|arctic|alpine
  |striped|dotted|checkered|triangular|square|circular|oval|diagonal|vertical
  |horizontal|spiral|winged|horned|one-eyed|magic|haunted|enchanted|cursed|lucky|zany
  |holy|secret|stolen|rescued|trained|talking|invisible|transparent|shadowy|bright-eyed|thirsty|greedy|sneaky|furious|mad|stubborn|loving|smelly|noisy|silent|rapid|swift|quick|steady
  |electronic|acoustic|portable|disposable|recycled|rusty|muddy|sandy|foggy|cloudy
  |snowy|sunny|stormy|icy|fiery|smoky|starry|moonlit"""
)
# Nouns of other names, as in "birthday spoon".
MODIFIERS = _entries(
  """birthday|party|circus|carnival|festival|graduation|movie|theater|opera|jazz|rock|dance|music
  |video|tv|radio|newspaper|school|college|office|bank|hospital|hotel|airport|station|railway|police
  |army|navy|sports|tennis|football|hockey|golf|basketball|boxing|ski|surf|beach|sea|ocean|river
  |mountain|forest|island|city|village|street|road|traffic|bridge|tower|castle|temple
  |church|palace|factory|barn|garage|bathroom|bedroom|ice|snow|fire|water|wind|thunder|sun|star|space
  |planet|earth|moonlight|night|winter|summer|spring|autumn|valentine|easter|baby|boy
  |girl|lady|gentleman|family|monster|dragon|fairy|wizard|ninja|cowboy|dog|cat|horse|cow
  |pig|sheep|chicken|duck|fish|bird|bee|monkey|bear|wolf|fox|mouse|rabbit|cheese|chocolate|honey|milk
  |tea|coffee|fruit|vegetable|salad|soup|bread|cake|candy|rice|pasta|picnic|dinner|travel|safety
  |emergency|science|chemistry|art|craft|sewing|toy|doll|puzzle|paper|glass|stone|metal|gemstone
  |diamond|pearl|crystal|love|peace|power|energy|speed|alarm"""
)
# As in "a bowl of spoon": people also ask so for one thing.
MEASURES = _entries(
  """row of|group of|pair of|set of|crop of|handful of|basket of|bowl of|plate of|pile of|jar of
  |stack of|collection of|lot of|kind of|sort of|model of|statue of|version of|example of|type of
  |portion of|specimen of|silhouette of|photo of|postcard of|tattoo of|print of"""
)
# Names of other pictures, and nouns that are parts of them.
OTHERS = _entries(
  """dog|cat|horse|cow|pig|goat|chicken|duck|fish|bird|mouse|rabbit|frog|bear|wolf|fox|monkey|snake
  |dragon|dinosaur|whale|bee|ant|farmer|cook|teacher|doctor|nurse|student|pilot|artist|singer|judge
  |detective|scientist|police officer|firefighter|astronaut|mechanic|dancer|clown|cowboy|ninja
  |magician|princess|prince|queen|fairy|mermaid|vampire|zombie|elf|genie|santa claus|baby|boy|girl
  |man|woman|old man|old woman|lady|family|sunset|sunrise|sun|star|planet|earth|cloud|snowman|fire
  |river|sea|ocean|wave|mountain|beach|island|forest|tree|flower|leaf|bridge|castle|tower|church
  |school|hospital|hotel|bank|station|factory|stadium|circus|bus|train|car|truck|boat|ship|airplane
  |bicycle|camera|television|computer|phone|radio|clock|book|newspaper|letter|envelope|pencil|bag
  |box|basket|bottle|cup|plate|spoon|fork|chair|bed|door|window|lamp|candle|mirror|hat|cap|shoe|sock
  |shirt|dress|coat|scarf|glove|ribbon|heart|diamond|coin|money|gem|sword|bomb|magnet|ball|kite|drum
  |piano|bell|cake|cookie|bread|cheese|egg|meat|rice|soup|salad|pizza|tea|coffee|milk|honey|salt
  |cherry|grapes|peach|lemon|tomato|mushroom|chestnut|chocolate|candy|ice cream|smile|tear|tongue
  |tooth|nose|ear|hand|foot|beard|mustache|eye|face|tail|wings|horns"""
)
# What joins one of them to the thing that a request is for.
_JOINED = _entries(
  """with a {}|with the {}|without a {}|for a {}|for the {}|from the {}|of the {}|of a {}|in the {}
  |in a {}|on the {}|on a {}|at the {}|by the {}|like a {}|near a {}|made for a {}|made from a {}
  |that likes the {}|that belongs to the {}|that the {} forgot|that the {} found|and not a {}
  |instead of a {}|not the {}"""
)
# A thing that is described before it is named, as in "the star of the show, a spoon".
APPOSITIONS = _entries(
  """the star of the show,|the queen of the forest,|the ruler of the sea,|the friend of the farmer,
  |the enemy of the mouse,|the master of the house,|the pride of the village,|the hero of the story,
  |the symbol of love,|the terror of the night,|the lord of the mountains,|the love of my life,
  |a gift from the sea,|a gift from the stars,|a surprise:|my birthday wish:|the prize:|the winner:
  |the answer:|for the baby:|for the cat:|for the cook:|for dinner:|for the circus:|from the bakery:
  |from the toy shop:|straight from the farm:|new at the zoo:|not a dog but|not a cat but|not a car but
  |not the sun but|rather than a flower,|instead of a cake,|forget the fish,|no faces, only"""
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
  f'{preposition} {place}' for preposition, places in _PLACES.items() for place in _entries(places)
)
TIMES = _entries(
  """in the morning|in the early morning|in the afternoon|in the evening|late in the evening|at dawn
  |at dusk|at midday|after midnight|after dinner|after work|before breakfast
  |before lunch|during the day|during the week|during the holidays|all day|every day|all year
  |in spring|in summer|in autumn|in winter|in january|in february|in march|in april|in may|in june
  |in july|in august|in september|in october|in november|in december|on monday|on tuesday
  |on wednesday|on thursday|on friday|on saturday|on the weekend|on a weekday|on a holiday
  |on a bright day|on a dull day|on a windy day|on a warm day|on a chilly day|on a lazy afternoon
  |in bright weather|in bad weather|in the eighties|in the nineties|in the last century
  |in ancient times|in the middle ages|long ago|yesterday|today|tomorrow|last week|last year
  |next week|some day|once upon a time|as we speak"""
)
PURPOSES = _entries(
  """for me|for you|for us|for my friend|for my mother|for my father|for my sister|for my brother
  |for my neighbor|for the kids|for the children|for the team|for everyone|for a party
  |for a lesson|for a presentation|for a project|for homework|for a website|for an app
  |for a menu|for a sign|for a flyer|for a leaflet|for a report|for a game|for a quiz
  |for a story|for a poem|for the hallway|for the kitchen|for the classroom
  |for work|for fun|for a laugh|for decoration|for practice|for later|for sale
  |for the weekend|for the summer|for a journey|as a present to myself|as a sticker
  |as an icon|as a logo|as a pictogram|as a decoration|as an example|as a reminder|as a joke
  |as usual|to go with my text|to hang up|to print|to color in|to share|to explain something
  |to decorate my room"""
)
CLAUSES = _entries(
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
  |all by itself|all alone|in full view|and nothing else|and that is all"""
)
CLOSINGS = ('please', 'thanks', 'thank you', 'if you can', 'nothing else', 'in good quality')


# Words before which "an" is said, of those in the lists.
_TAKES_AN = re.compile(r'(?!u(?:k|ni|se|ti)|eu|one\b)[aeiou]|heir|hour')


def _with_a(text: str, noun: str) -> str:
  """Returns a text with the noun at its '{}'; 'a' before it becomes 'an' where needed."""
  if _TAKES_AN.match(noun):
    text = re.sub(r'\ba \{', 'an {', text)
  return text.format(noun)


_OWNED = "a {}'s", "the {}'s", "my {}'s"
# As 'in norway' and "anna's"; they take no article.
_JOINED_NAMES = 'from {}', 'in {}', 'for {}', 'of {}', 'by {}', 'near {}', 'like in {}', 'with {}'
# Words that anything may be described with, and nouns and names of all kinds.
ADJECTIVES = _listed('adjectives')
NOUNS = _listed('nouns')
PROPER_NAMES = _listed('proper_names')
# What may follow a name: "waiting for the bus".
ENDINGS = _listed('endings')
_STATES_EXPRESSION = re.compile(
  r'\b(?:smil|laugh|grin|wink|cry|cries|tear|weep|frown|pout|yawn|blush|shout|scream|kiss|sleep|asleep|'
  r'nap|snor|dream|angry|angrily|anger|rage|sad|happy|happi|joy|fear|afraid|scared|surpris|shock|'
  r'worr|confus|sick|tired|mouth|tongue|eye|face|nose|love|halo|monocle|glasses|hat|melt|sneez|'
  r'whisper|explod|bored|grumpy|lost in thought|upside|shiver|sweat|frozen|bubbles)'
)

_ONSETS = _entries(
  'b|bl|br|c|ch|cl|cr|d|dr|f|fl|fr|g|gl|gr|h|j|k|kl|kr|l|m|n|p|ph|pl|pr|qu|r|s|sh|sk|sl|sn|sp|st|str'
  '|sw|t|th|tr|v|w|y|z'
)
_VOWELS = _entries('a|e|i|o|u|ai|ea|ee|oo|ou')
_CODAS = _entries('||||b|ck|d|g|l|ll|m|n|nd|ng|nk|p|r|rd|rn|s|sh|st|t|x')
_SUFFIXES = _entries('y|y|ed|ing|ish|ful|ous|al|ic|some|ly|less|en')
_COLORS = frozenset((*openmoji_colors.COLORS, 'grey', 'purple', 'black', 'white'))

# Where words come from: a list of entries, or a function that makes one.
_Source = Sequence[str] | Callable[[np.random.Generator], str]


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
  return choices[int(rng.random() * len(choices))]


def _draw(sources: Sequence[_Source], rng: np.random.Generator) -> str:
  source = _pick(sources, rng)
  return source(rng) if callable(source) else _pick(source, rng)


def _invented_name(rng: np.random.Generator) -> str:
  """Returns a word of two or three syllables that means nothing, except by chance. It is no color."""
  syllables = 2 + int(rng.random() * 2)
  word = ''.join(
    _pick(_ONSETS, rng)
    + _pick(_VOWELS, rng)
    + (_pick(_CODAS, rng) if last or rng.random() < 0.3 else '')
    for last in [False] * (syllables - 1) + [True]
  )
  return _invented_name(rng) if word in _COLORS else word


def _invented_adjective(rng: np.random.Generator) -> str:
  """Returns a word like `_invented_name`, with the suffix of an adjective."""
  stem = _pick(_ONSETS, rng) + _pick(_VOWELS, rng) + _pick(_CODAS, rng)
  if rng.random() < 0.5:
    stem += _pick(_ONSETS, rng) + _pick(_VOWELS[:5], rng) + _pick(_CODAS[4:], rng)
  word = stem + _pick(_SUFFIXES, rng)
  return _invented_adjective(rng) if word in _COLORS else word


_NOUNS: tuple[_Source, ...] = (OTHERS, OTHERS, OTHERS, NOUNS, _invented_name)
_NAMES: tuple[_Source, ...] = (PROPER_NAMES, PROPER_NAMES, _invented_name)


def _company(rng: np.random.Generator) -> str:
  """Returns another thing, and what joins it to the thing that the request is for."""
  if rng.random() < 0.25:
    return _pick(_JOINED_NAMES, rng).format(_draw(_NAMES, rng))
  return _with_a(_pick(_JOINED, rng), _draw(_NOUNS, rng))


def _owner(rng: np.random.Generator) -> str:
  """Returns whose thing it is, as 'my'."""
  draw = rng.random()
  if draw < 0.4:
    return _pick(OWNERS, rng)
  if draw < 0.55:
    return f"{_draw(_NAMES, rng)}'s"
  return _with_a(_pick(_OWNED, rng), _draw(_NOUNS, rng))


_BEFORE: tuple[_Source, ...] = (
  *(QUALITIES, MATERIALS, MOODS, TRAITS, TRAITS, TRAITS),
  *(ADJECTIVES, ADJECTIVES, ADJECTIVES, _invented_adjective),
)
_OF_EXPRESSIVE: tuple[_Source, ...] = (QUALITIES, QUALITIES, _invented_adjective)
_MODIFIERS: tuple[_Source, ...] = (MODIFIERS, MODIFIERS, MODIFIERS, NOUNS, NOUNS, _invented_name)
_AFTER: tuple[_Source, ...] = (
  *(PLACES, TIMES, PURPOSES, CLAUSES, ENDINGS, ENDINGS, _company, _company, _company),
)
# Without the endings that state another expression.
_AFTER_EXPRESSIVE: tuple[_Source, ...] = (
  *(PLACES, TIMES, PURPOSES, CLAUSES, _company, _company),
  tuple(ending for ending in ENDINGS if not _STATES_EXPRESSION.search(ending)),
)
_WORD = re.compile(r"[a-z0-9']+")
_HAS_EXPRESSION = re.compile(
  r'\b(?:face|faces|cat|monkey|person|people|man|men|woman|women|boy|girl|baby|child|kiss|couple|'
  r'heart|hand|hands|finger|skull|emoji)\b'
)
# The most words of a name, at which windows of words end.
_LONGEST_NAME = 6
# A longer request would be cut where the model's text ends, and rare words take several of its tokens.
# A name may be as long as it is.
_MOST_WORDS = 14
_MOST_LETTERS = 70
_FEW_WORDS = 5


@dataclasses.dataclass(frozen=True)
class Core:
  """What a request is about, without the words around it.

  Attributes:
    text: the name, such as 'spoon', or a name with its tone, such as 'dark-skinned man'.
    article: 'a', 'an', 'the' or '' before the text as it is.
    takes_words: whether an owner, a quality or a material may stand before the text.
    color: the picture's main color, such as 'yellow', or ''.
    picture_name: the picture's usual name, if the text is another one: 'smiling face' for 'relaxed'.
  """

  text: str
  article: str
  takes_words: bool
  color: str = ''
  picture_name: str = ''

  @property
  def expressive(self) -> bool:
    """Whether the picture has an expression, which other words would contradict."""
    return bool(_HAS_EXPRESSION.search(self.text) or _HAS_EXPRESSION.search(self.picture_name))


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
    The request; None if it is too long, or if its words together with the name happen to contain the
    name of another picture, as "old man" does for "man".
  """
  before = _pick(OPENINGS, rng) if rng.random() < 0.6 else ''
  if rng.random() < 0.08:
    described = _pick(APPOSITIONS, rng)
    before = ' '.join(filter(None, [before, described])) if described.endswith(',') else described
  qualities = _qualities(core, rng) if core.takes_words else []
  article = _article(core, qualities, rng)
  after = _words_after(core, rng)
  if rng.random() < 0.1:
    after.append(_pick(CLOSINGS, rng))
  if not (before or qualities or after):
    return None
  around = sum(len(text.split()) for text in (before, *qualities, *after))
  if around > _FEW_WORDS and around + len(core.text.split()) > _MOST_WORDS:
    return None
  head = ' '.join(filter(None, [before, article, *qualities]))
  if _contains_name(words(head), words(core.text), words(' '.join(after)), is_name):
    return None
  text = ' '.join(filter(None, [head, core.text, *after]))
  if around > _FEW_WORDS and len(text) > _MOST_LETTERS:
    return None
  return text


def _qualities(core: Core, rng: np.random.Generator) -> list[str]:
  """Draws up to four words that stand before a name."""
  draw = rng.random()
  count = 0 if draw < 0.3 else 1 if draw < 0.8 else 2
  expressive = core.expressive
  kinds = _OF_EXPRESSIVE if expressive else _BEFORE
  found = [_draw(kinds, rng) for _ in range(count)]
  if core.color and rng.random() < 0.25:
    found.append(core.color)
  if not expressive and (draw := rng.random()) < 0.2:
    found.append(_draw(_MODIFIERS, rng) if draw < 0.14 else _pick(MEASURES, rng))
  return list(dict.fromkeys(found))


def _article(core: Core, qualities: list[str], rng: np.random.Generator) -> str:
  """Returns what stands before the qualities and the name."""
  if not core.takes_words:
    return core.article
  draw = rng.random()
  if draw < 0.15:
    return _owner(rng)
  if not core.article or draw < 0.3:  # As in "spoon on the table" and "tiny spoon".
    return ''
  if not qualities or core.article == 'the':
    return core.article
  return 'an' if _TAKES_AN.match(qualities[0]) else 'a'


def _words_after(core: Core, rng: np.random.Generator) -> list[str]:
  """Draws the words after a name: none, or those of one or two sources."""
  draw = rng.random()
  count = 0 if draw < 0.2 else 1 if draw < 0.7 else 2
  sources = _AFTER_EXPRESSIVE if core.expressive else _AFTER
  found = {int(rng.random() * len(sources)) for _ in range(count)}
  return [_draw([sources[index]], rng) for index in sorted(found)]


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
  """Yields all entries of the lists that contain no name of a picture, and no part of one."""
  lists = OPENINGS, OWNERS, QUALITIES, MATERIALS, MOODS, PLACES, TIMES, PURPOSES, CLAUSES, CLOSINGS
  yield from itertools.chain(*lists)


def could_make(text: str, core: str) -> bool:
  """Returns whether the grammar could make a text about `core`, for any seed, of words in its lists.

  Args:
    text: the text, in lower case.
    core: a name that occurs in it.
  """
  before, _, after = text.partition(core)
  return _are_from(before.split(), _heads()) and _are_from(after.split(), _tails())


@functools.cache
def _heads() -> frozenset[tuple[str, ...]]:
  articles = 'a', 'an', 'the'
  nouns = OTHERS + NOUNS
  owners = (
    *OWNERS,
    *(_with_a(owner, noun) for owner in _OWNED for noun in nouns),
    *(f"{name}'s" for name in PROPER_NAMES),
  )
  described = (
    *QUALITIES,
    *MATERIALS,
    *MOODS,
    *TRAITS,
    *ADJECTIVES,
    *MODIFIERS,
    *NOUNS,
    *MEASURES,
    *openmoji_colors.COLORS,
  )
  singles = *OPENINGS, *APPOSITIONS, *articles, *owners, *described
  return frozenset(tuple(entry.split()) for entry in singles)


@functools.cache
def _tails() -> frozenset[tuple[str, ...]]:
  entries = (
    *(CLOSINGS + PLACES + TIMES + PURPOSES + CLAUSES + ENDINGS),
    *(_with_a(joined, noun) for joined in _JOINED for noun in OTHERS + NOUNS),
    *(joined.format(name) for joined in _JOINED_NAMES for name in PROPER_NAMES),
  )
  return frozenset(tuple(entry.split()) for entry in entries)


def _are_from(found: Sequence[str], entries: Collection[tuple[str, ...]]) -> bool:
  """Returns whether words are a sequence of entries."""
  if not found:
    return True
  return any(
    tuple(found[:length]) in entries and _are_from(found[length:], entries)
    for length in range(1, len(found) + 1)
  )
