"""Renders one HTML page of prompts and their pictures, by category and challenge.

The page only needs the picture files: no external scripts, no server. Without scripts it shows
everything and links to the categories; with scripts it also filters.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

from parti_jax.sampling import images as images_lib

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 0 20px; }
header { position: sticky; top: 0; background: Canvas; padding: 8px 0; z-index: 1;
  border-bottom: 1px solid #8885; }
h1 { font-size: 22px; margin: 16px 0 4px; } h2 { font-size: 19px; margin: 28px 0 8px; }
h3 { font-size: 15px; margin: 16px 0 6px; opacity: .8; }
h2, h3 { scroll-margin-top: 90px; }
nav a { margin-right: 12px; white-space: nowrap; }
.about, .note { opacity: .75; }
.prompts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr));
  gap: 14px; }
article { border: 1px solid #8885; border-radius: 8px; padding: 10px; }
article p { margin: 0 0 6px; }
.pictures { display: flex; flex-wrap: wrap; gap: 6px; }
figure { margin: 0; width: 98px; } figcaption { font-size: 11px; opacity: .75; }
figure img { width: 98px; height: 98px; object-fit: cover; border-radius: 4px; display: block; }
figure:first-child { outline: 2px solid #2a7de1; outline-offset: 2px; border-radius: 4px; }
.unranked figure:first-child { outline: none; }
.note, .cut { font-size: 13px; } .cut { color: #b26a00; } [hidden] { display: none; }
"""

_SCRIPT = """
const filters = ['category', 'challenge'].map(name => document.getElementById('_' + name));
const words = document.getElementById('_words');
function show() {
  let count = 0;
  for (const article of document.querySelectorAll('article')) {
    const fits = filters.every(f => !f.value || article.dataset[f.id.slice(1)] === f.value) &&
      article.querySelector('p').textContent.toLowerCase().includes(words.value.toLowerCase());
    article.hidden = !fits;
    count += fits;
  }
  for (const part of document.querySelectorAll('section'))
    part.hidden = !part.querySelector('article:not([hidden])');
  document.getElementById('_count').textContent = count;
}
for (const f of [...filters, words]) f.addEventListener('input', show);
document.getElementById('_filters').hidden = false;
"""


def page(title: str, about: str, prompts: Sequence[Mapping], ranked: bool) -> str:
  """Renders the page.

  Args:
    title: its heading.
    about: a line about the model and its settings.
    prompts: the entries of prompts.json: 'prompt', 'category', 'challenge', 'note', 'cut' (the part
      of the prompt that the model didn't read) and 'pictures', each with 'file' (relative to the
      page), 'score' (None if unranked) and 'image_index'.
    ranked: whether each prompt's first picture is the best by a ranker.

  Returns:
    The HTML.
  """
  categories = _grouped(prompts, 'category')
  challenges = _grouped(prompts, 'challenge')
  anchors = _Anchors(categories, challenges)
  order = 'best first by the ranker, with its score' if ranked else 'not ranked'
  links = ' '.join(
    f'<a href="#{anchors.of(name)}">{_text(name)} ({len(members)})</a>'
    for name, members in categories.items()
  )
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body{'' if ranked else ' class="unranked"'}>
<h1>{_text(title)}</h1>
<p class="about">{_text(about)} Pictures: {order}.</p>
<header>
<nav>{links}</nav>
<div id="_filters" hidden>
<label>Category {_select('category', categories)}</label>
<label>Challenge {_select('challenge', challenges)}</label>
<label>Words <input id="_words" type="search"></label>
<span><span id="_count">{len(prompts)}</span> of {len(prompts)} prompts</span>
</div>
</header>
<main>
{''.join(_category(name, members, anchors) for name, members in categories.items())}</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _grouped(prompts: Sequence[Mapping], key: str) -> dict[str, list[Mapping]]:
  """Returns {value: its prompts}, in alphabetical order of the values."""
  groups: dict[str, list[Mapping]] = {}
  for prompt in prompts:
    groups.setdefault(prompt[key], []).append(prompt)
  return dict(sorted(groups.items()))


def _text(text: str) -> str:
  return html.escape(str(text))


class _Anchors:
  """The anchors of links, unique for each category and challenge.

  Anchors never contain '--' or begin with '_', unlike the page's other ids.
  """

  def __init__(self, categories: Iterable[str], challenges: Iterable[str]):
    self._categories = images_lib.distinct_names(categories)
    self._challenges = images_lib.distinct_names(challenges)

  def of(self, category: str, challenge: str | None = None) -> str:
    part = '' if challenge is None else f'--{self._challenges[challenge]}'
    return self._categories[category] + part


def _select(name: str, groups: Mapping) -> str:
  options = ''.join(
    f'<option value="{_text(value)}">{_text(value)} ({len(members)})</option>'
    for value, members in groups.items()
  )
  return f'<select id="_{name}"><option value="">all</option>{options}</select>'


def _category(category: str, prompts: Sequence[Mapping], anchors: _Anchors) -> str:
  parts = []
  for challenge, members in _grouped(prompts, 'challenge').items():
    articles = ''.join(map(_article, members))
    parts.append(
      f'<section>\n<h3 id="{anchors.of(category, challenge)}">{_text(challenge)}</h3>\n'
      f'<div class="prompts">\n{articles}</div>\n</section>\n'
    )
  return (
    f'<section>\n<h2 id="{anchors.of(category)}">{_text(category)}</h2>\n'
    f'{"".join(parts)}</section>\n'
  )


def _article(prompt: Mapping) -> str:
  note = f'<p class="note">{_text(prompt["note"])}</p>\n' if prompt['note'] else ''
  if prompt['cut']:
    note += f'<p class="cut">{_text(prompt["cut"])}</p>\n'
  figures = ''.join(_figure(prompt['prompt'], picture) for picture in prompt['pictures'])
  return (
    f'<article data-category="{_text(prompt["category"])}" '
    f'data-challenge="{_text(prompt["challenge"])}">\n<p>{_text(prompt["prompt"])}</p>\n'
    f'{note}<div class="pictures">\n{figures}</div>\n</article>\n'
  )


def _figure(prompt: str, picture: Mapping) -> str:
  file = _text(picture['file'])
  score = '' if picture['score'] is None else f'{picture["score"]:.3f}'
  return (
    f'<figure><a href="{file}"><img src="{file}" loading="lazy" alt="{_text(prompt)}"></a>'
    f'<figcaption>{score}</figcaption></figure>\n'
  )
