"""The notebooks of examples/: their cells are read, and run without Jupyter."""

import ast
import json
import pathlib

import pytest

import parti_jax

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / 'examples').glob('*.ipynb'))


def _cells(notebook):
  cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
  return [cell for cell in cells if cell['cell_type'] == 'code']


def _code(notebook):
  return [''.join(cell['source']) for cell in _cells(notebook)]


def test_there_are_notebooks():
  expected = {'draw', 'edit', 'new_objective', 'train_on_your_pictures'}
  assert {path.stem for path in NOTEBOOKS} >= expected


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_public_names_and_keep_no_output(notebook):
  assert not any(cell['outputs'] or cell['execution_count'] for cell in _cells(notebook))
  used = {
    node.attr
    for code in _code(notebook)
    for node in ast.walk(ast.parse(code))
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'parti_jax'
  }
  assert used and used - {'__path__'} <= set(parti_jax.__all__)


@pytest.mark.slow
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = {'__name__': '__main__'}
  for number, code in enumerate(_code(notebook)):
    exec(compile(code, f'{notebook.name}, cell {number}', 'exec'), names)
  if notebook.stem == 'train_on_your_pictures':
    # Chance is log(64) = 4.2; positions of the shapes stay unknown to the text.
    assert float(names['metrics']['loss']) < 2.5
    assert names['result'].images.shape == (2, 4, 16, 16, 3)
  if notebook.stem == 'edit':
    assert names['unchanged']
    assert names['likelihoods'].argmax(axis=0).tolist() == [0, 1, 2]
    assert [partial.rows for partial in names['partials']] == list(range(1, 9))
    assert names['partials'][-1].result.images.shape == (1, 2, 64, 64, 3)
  if notebook.stem == 'new_objective':
    measures = names['trainer'].evaluate(names['state'].params, [names['batch']])
    assert measures['accuracy'] > 0.9
