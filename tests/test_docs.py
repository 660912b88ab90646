"""What the README and the documentation say: paths exist, and examples run."""

import pathlib
import re

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = [REPOSITORY / 'README.md', REPOSITORY / 'CONTRIBUTING.md', *REPOSITORY.glob('docs/*.md')]
# Where a path on a page may begin.
_FOLDERS = ('.', 'parti_jax', 'gin_configs', 'tests')


def _text(path):
  return path.read_text(encoding='utf-8')


def _code(path, language):
  return re.findall(rf'^```{language}\n(.*?)^```', _text(path), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_pages_name_gin_files_that_exist(page):
  named = re.findall(r'--gin_file=(gin_configs/[\w/{},-]+\.gin)', _text(page))
  assert not [name for name in named if not (REPOSITORY / name).is_file()]


def test_paths_of_the_architecture_page_exist():
  named = re.findall(r'`([\w/]+/[\w./]*)`', _text(REPOSITORY / 'docs' / 'architecture.md'))
  assert len(named) > 50
  assert not [
    name for name in named if not any((REPOSITORY / top / name).exists() for top in _FOLDERS)
  ]


def test_links_of_pages_outside_of_the_site_exist():
  for page in (REPOSITORY / 'README.md', REPOSITORY / 'CONTRIBUTING.md'):
    links = re.findall(r'\]\((?!http)([^)#]+)', _text(page))
    assert links and not [link for link in links if not (page.parent / link).exists()]


def test_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  draw, train = _code(REPOSITORY / 'README.md', 'python')
  names = {}
  exec(draw, names)
  assert names['result'].images.shape == (1, 4, 64, 64, 3)
  assert (tmp_path / 'firefighter.png').is_file()
  # On one device and for fewer steps, which takes less time; a loss of log(1,024) = 6.9 is chance.
  assert 'make_mesh()' in train and 'range(60)' in train
  train = train.replace('make_mesh()', 'make_mesh(devices=jax.devices()[:1])')
  exec(train.replace('range(60)', 'range(8)'), names | {'jax': jax})
  losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
  assert len(losses) == 8 and losses[-1] < 6 < losses[0]
