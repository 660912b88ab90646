"""Tests of `parti-jax prompts`: the file, the pictures, the page."""

import argparse
import html.parser
import json
import os
import re

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import prompts as prompts_lib
from parti_jax.core.errors import UserError
from parti_jax.evaluation.datasets import prompts_file

HEADER = 'Prompt\tCategory\tChallenge\tNote\n'
PROMPTS = (
  HEADER
  + """bond\tAbstract\tBasic\tBiology-inspired concepts
the word "A<B"\tWorld Knowledge\tWriting & Symbols\t
a red apple\tProduce & Plants\tBasic
bond\tAbstract\tComplex\t
"""
)


def draw(caption, index):
  return np.full((fakes.SIZE, fakes.SIZE, 3), 40 * index + len(caption), np.uint8)


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  pipeline = fakes.FakePipeline(draw, fakes.FakeRanker(draw))
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None, weights='float': pipeline
  )
  return pipeline


@pytest.fixture(name='flags')
def fixture_flags(tmp_path):
  path = tmp_path / 'MyPrompts.tsv'
  path.write_text(PROMPTS)
  return [str(path), f'--output_dir={tmp_path}/out', '--num_images=3']


def run(*arguments):
  parser = argparse.ArgumentParser()
  prompts_lib.add_arguments(parser)
  return prompts_lib.run(parser.parse_args(arguments))


class Page(html.parser.HTMLParser):
  """Parses a page for the tests; all tags must be closed."""

  def __init__(self, path):
    super().__init__()
    self.open, self.images, self.links, self.anchors, self.texts = [], [], [], set(), []
    self.feed(path.read_text())
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    if tag not in ('meta', 'img', 'input'):
      self.open.append(tag)
    if tag == 'img':
      assert attrs['loading'] == 'lazy'
      self.images.append(attrs['src'])
    if tag == 'a':
      self.links.append(attrs['href'])
    self.anchors.add(attrs.get('id'))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data.strip())


def test_the_page_shows_all_prompts_best_first(pipeline, flags, tmp_path, capsys):
  assert run(*flags) == 0
  out = tmp_path / 'out'
  page = Page(out / 'index.html')
  assert len(page.images) == 4 * 3 and all((out / image).is_file() for image in page.images)
  headings = [
    text for text in page.texts if text in ('Abstract', 'Produce & Plants', 'World Knowledge')
  ]
  assert headings == ['Abstract', 'Produce & Plants', 'World Knowledge']
  assert 'the word "A<B"' in page.texts and 'Biology-inspired concepts' in page.texts
  assert {link[1:] for link in page.links if link.startswith('#')} <= page.anchors
  content = json.loads((out / 'prompts.json').read_text())
  assert [prompt['prompt'] for prompt in content['prompts']] == [
    'bond',
    'the word "A<B"',
    'a red apple',
    'bond',
  ]
  first = content['prompts'][0]['pictures']
  assert [picture['image_index'] for picture in first] == [2, 1, 0]  # In the fake ranker's order.
  assert [picture['score'] for picture in first] == [2, 1, 0]
  best = np.asarray(Image.open(out / first[0]['file']))
  np.testing.assert_array_equal(best, draw('bond', 2))
  assert str(out / 'index.html') in capsys.readouterr().out
  assert Image.open(out / 'abstract.png').height > 128


def test_a_model_without_a_ranker(pipeline, flags, tmp_path):
  pipeline.ranker = None
  run(*flags)
  content = json.loads((tmp_path / 'out' / 'prompts.json').read_text())
  assert not content['ranked'] and content['prompts'][0]['pictures'][0] == {
    'file': content['prompts'][0]['pictures'][0]['file'],
    'score': None,
    'image_index': 0,
  }
  assert 'not ranked' in (tmp_path / 'out' / 'index.html').read_text()


def test_a_stopped_run_resumes(pipeline, flags, tmp_path, monkeypatch):
  monkeypatch.setattr(prompts_lib, '_AT_ONCE', 3)
  with pipeline.stopped_after(2):
    run(*flags)
  assert len(os.listdir(tmp_path / 'out' / 'pictures')) == 2
  run(*flags)
  assert pipeline.generated == [['bond'], ['the word "A<B"'], ['a red apple'], ['bond']]
  with pytest.raises(UserError, match="another run, with sampling {}, but .* has .*'int8'"):
    run(*flags, '--weights=int8')
  with pytest.raises(UserError, match='another run, with num_images 3, but .* has 2'):
    run(*flags, '--num_images=2')


CATEGORIES = [
  '動物',
  '食べ物',
  'Food & Drink',
  'Food, Drink',
  'Cat',
  'cat',
  'Con',
  '../x',
  'Words',
  '🍎',
  '🍏',
  'cafe\u0301',
  'caf\u00e9',
]


def test_each_category_and_challenge_has_its_own_sheet_and_section(pipeline, tmp_path):
  path = tmp_path / 'prompts.tsv'
  rows = [
    f'prompt {number}\t{category}\t{challenge}\t\n'
    for number, category in enumerate(CATEGORIES)
    for challenge in ('A & B', 'A, B', '読み')
  ]
  path.write_text(HEADER + ''.join(rows), encoding='utf-8')
  run(str(path), f'--output_dir={tmp_path}/out', '--num_images=1')
  out = tmp_path / 'out'
  sheets = {sheet.name.casefold() for sheet in out.glob('*.png')}
  assert len(sheets) == len(CATEGORIES)
  assert {'動物.png', '食べ物.png', 'words.png'} <= sheets and 'con.png' not in sheets
  text = (out / 'index.html').read_text(encoding='utf-8')
  ids = re.findall(' id="([^"]*)"', text)
  assert len(set(ids)) == len(ids) and len(re.findall('<h3 ', text)) == 3 * len(CATEGORIES)
  page = Page(out / 'index.html')
  links = [link[1:] for link in page.links if link.startswith('#')]
  assert len(set(links)) == len(CATEGORIES) and set(links) <= page.anchors
  assert set(re.findall("getElementById\\('([^']*)'\\)", text)) <= set(ids)


def test_a_run_resumes_with_folders_that_have_other_words(pipeline, tmp_path):
  path = tmp_path / 'prompts.tsv'
  path.write_text(
    HEADER + '赤いりんご\t食べ物\t基本\t\nbond\tAbstract\tBasic\t\n', encoding='utf-8'
  )
  flags = [str(path), f'--output_dir={tmp_path}/out', '--num_images=1']
  run(*flags)
  pictures = tmp_path / 'out' / 'pictures'
  (folder,) = pictures.glob('0001_*')
  assert folder.name.startswith('0001_赤いりんご_')
  folder.rename(pictures / folder.name.replace('赤いりんご', 'picture'))
  run(*flags)
  assert pipeline.generated == [['赤いりんご', 'bond']]


def test_only_the_first_prompts(pipeline, flags, tmp_path):
  run(*flags, '--max_prompts=1')
  assert pipeline.generated == [['bond']]
  run(*flags)  # Now the others.
  assert len(pipeline.generated[1]) == 3
  assert len(Page(tmp_path / 'out' / 'index.html').images) == 12


def test_text_that_the_model_did_not_read_is_shown(pipeline, flags, tmp_path):
  generate = pipeline.generate

  def cut(prompts, **settings):
    prompts_lib.warnings.warn('prompt 2 is longer than the 8 text tokens; left out: "A<B"')
    for number in (1, 2):  # The ranker may read less, and numbers texts that differ.
      prompts_lib.warnings.warn(f'text {number} is longer than the 4 of the ranker; left out: "C"')
    return generate(prompts, **settings)

  pipeline.generate = cut
  run(*flags)
  content = json.loads((tmp_path / 'out' / 'prompts.json').read_text())
  assert [bool(prompt['cut']) for prompt in content['prompts']] == [True, True, False, True]
  shown = Page(tmp_path / 'out' / 'index.html').texts
  of_ranker = 'longer than the 4 of the ranker; left out: "C"'
  assert f'longer than the 8 text tokens; left out: "A<B"; {of_ranker}' in shown
  assert of_ranker in shown


@pytest.mark.parametrize(
  'content, message',
  [
    ('', 'line 1: expected the columns Prompt, Category, Challenge, Note, separated by tabs'),
    ('Prompt,Category\n', "line 1: .*got 'Prompt,Category'"),
    (HEADER, 'has no prompts'),
    (HEADER + 'a\tb\tc\td\n\nonly this\n', 'line 4: 1 cells'),
    (HEADER + 'a\tb\tc\td\te\n', 'line 2: 5 cells'),
    (HEADER + '\tb\tc\td\n', 'line 2: its Prompt is empty'),
    (HEADER + 'a\t \tc\td\n', 'line 2: its Category is empty'),
  ],
)
def test_files_of_another_format(pipeline, tmp_path, content, message):
  path = tmp_path / 'bad.tsv'
  path.write_text(content)
  with pytest.raises(UserError, match=f'bad.tsv.*{message}'):
    run(str(path), f'--output_dir={tmp_path}/out')
  assert not (tmp_path / 'out').exists()


def test_a_prompt_that_the_model_cannot_read(pipeline, flags, tmp_path, monkeypatch):
  def encode(texts):
    if texts == ['a red apple']:
      raise UserError(f'{texts[0]!r} is not a class')
    return np.ones([len(texts), 4], np.int32)

  monkeypatch.setattr(pipeline, 'encode_prompts', encode)
  with pytest.raises(UserError, match="cannot read the prompt 'a red apple': .* is not a class"):
    run(*flags)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content', ['', '[]', '5', '[' * 10**5])
def test_a_folder_whose_claim_is_damaged(pipeline, flags, tmp_path, content):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'run.json').write_text(content)
  with pytest.raises(UserError, match='run.json is damaged; choose another --output_dir'):
    run(*flags)


def test_a_missing_file(pipeline):
  with pytest.raises(UserError, match='nothing.tsv cannot be read'):
    run('nothing.tsv')


def test_parti_prompts_itself():
  path = os.environ.get('PARTI_PROMPTS')
  if not path:
    pytest.skip('$PARTI_PROMPTS does not name PartiPrompts.tsv')
  prompts = prompts_file.read(path)
  assert len(prompts) == 1632
  assert len({prompt.category for prompt in prompts}) == 12
  assert len({prompt.challenge for prompt in prompts}) == 11
