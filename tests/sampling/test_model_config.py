"""Tests a config.json edited by hand: one line names each invalid value as in the file."""

import copy
import json
import pathlib
import re

import pytest

import parti_jax
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.sampling import text_to_image

DEMO = text_to_image.DEMO_FOLDER
CONFIG = json.loads((DEMO / model_folder.CONFIG_FILE).read_text(encoding='utf-8'))


def nested(depth):
  value = []
  for _ in range(depth):
    value = [value]
  return value


WRONG = {
  'null': None,
  '-1': -1,
  '0': 0,
  '1.5': 1.5,
  'text': 'x',
  'list': [],
  'object': {},
  'true': True,
  '1e300': 1e300,
  '2**40': 2**40,
  'nan': float('nan'),
  'inf': float('inf'),
  'two floats': [8.0, 8.0],
  'lists': [[8], [8]],
  'long text': 'x\n' * 10**5,
  'digits': 10**400,
  'nested': nested(500),
}
# Entries that accept some of these values, and why.
RATES = {'0'}  # Dropout is only for training.
WEIGHTS = {'0', '1.5'}  # The quantizer's loss too.
SETTINGS = {'0', '1.5'}
ALLOWED = {
  ('parti', 'dropout'): RATES,
  ('ranker', 'dropout'): RATES,
  ('tokenizer', 'commitment'): WEIGHTS,
  ('super_resolution', 'low_rank'): {'0'},  # With these values other parameters are missing.
  ('sampling', 'guidance_scale'): SETTINGS,
  ('sampling', 'guidance_start'): SETTINGS,
  ('sampling', 'temperature'): SETTINGS | {'2**40'},
  ('sampling', 'top_k'): {'0'},
  ('sampling', 'exit_threshold'): {'0'},
  ('sampling', 'guidance_skip_threshold'): {'0'},
  ('sampling',): {'object'},
  ('parameters',): {'object'},
  ('provenance',): {'object'},
  **{('parameters', name): {'0', '2**40', 'digits'} for name in ('parti', *model_folder.NETWORKS)},
  **{('provenance', name): set(WRONG) for name in CONFIG['provenance']},
}


def entries(value, path=()):
  """Yields paths to all values of a JSON object, including those in lists."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, item in items:
    yield (*path, key)
    if isinstance(item, (dict, list)):
      yield from entries(item, (*path, key))


def edited(path, value):
  config = copy.deepcopy(CONFIG)
  place = config
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  return config


@pytest.fixture
def folder(tmp_path):
  """Makes a copy of the demo's folder with the test's config.json."""
  for file in DEMO.iterdir():
    if file.is_file() and file.name != model_folder.CONFIG_FILE:
      (tmp_path / file.name).symlink_to(file)
  return tmp_path


def write(folder, config):
  (folder / model_folder.CONFIG_FILE).write_text(
    config if isinstance(config, str) else json.dumps(config), encoding='utf-8'
  )


@pytest.mark.parametrize('path', list(entries(CONFIG)), ids=lambda path: '.'.join(map(str, path)))
def test_wrong_values_of_each_entry(folder, path, monkeypatch):
  # Skips the slow parts that don't concern the file.
  monkeypatch.setattr(parameter_files, 'read', lambda path, expected: None)
  monkeypatch.setattr(model_folder, 'abstract', lambda name, config: {})
  for name, value in WRONG.items():
    write(folder, edited(path, value))
    if name in ALLOWED.get(path, ()):
      model_folder.load(folder)
      continue
    with pytest.raises(UserError) as caught:
      model_folder.load(folder)
    message = str(caught.value)
    assert '\n' not in message and len(message) < 600, name
    rest = message.removeprefix(f'{folder / model_folder.CONFIG_FILE}: ')
    assert rest != message, message
    # Names the entry without Python's terms.
    assert all(str(key) in rest for key in path if isinstance(key, str)), message
    assert not re.search(r'Config\.|object is|argument|mapping|hashable', rest)
    assert path == ('format_version',) or not re.search(r'\b(None|True)\b', rest)


@pytest.mark.parametrize('path', [path for path in entries(CONFIG) if len(path) == 2])
def test_entries_that_are_missing_or_unknown(folder, path, monkeypatch):
  monkeypatch.setattr(parameter_files, 'read', lambda path, expected: None)
  monkeypatch.setattr(model_folder, 'abstract', lambda name, config: {})
  part, name = path
  config = copy.deepcopy(CONFIG)
  config[part][f'{name}\n2'] = config[part].pop(name)
  write(folder, config)
  # The provenance may have any names, and so may the parameter counts in 'parameters'.
  if part == 'provenance' or (part == 'parameters' and name != 'stored_as'):
    model_folder.load(folder)
    return
  with pytest.raises(UserError, match=name) as caught:
    model_folder.load(folder)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'text, message',
  [
    ('null', 'format_version is None'),
    ('5', 'format_version is None'),
    ('{"format_version": 1.0}', 'format_version is 1.0'),
    ('{"format_version": true}', 'format_version is True'),
    ('{"format_version": 1}', "'parti' is missing"),
    ('{"a": 1', 'damaged'),
    ('{"format_version": 1, "format_version": 1}', "the name 'format_version' appears twice"),
    (
      json.dumps(CONFIG).replace('"width": 192', '"width": 192, "width": 256'),
      "the name 'width' appears twice",
    ),
    ('[' * 10**5, 'nested too deeply'),
  ],
)
def test_files_of_another_form(folder, text, message):
  write(folder, text)
  with pytest.raises(UserError, match=message) as caught:
    model_folder.load(folder)
  assert '\n' not in str(caught.value)


def test_both_names_of_a_size_are_refused(folder):
  older = edited(('parti', 'attention_pattern'), 'row')
  write(folder, older)
  with pytest.raises(UserError, match="'attention_patterns' and its older name 'att"):
    model_folder.load(folder)
  del older['parti']['attention_patterns']
  older['parti']['attention_pattern'] = 'causal'
  write(folder, older)
  assert model_folder.load(folder).generator_config.attention_patterns == ('global',)
  older['parti']['attention_pattern'] = ['row']
  write(folder, older)
  with pytest.raises(UserError, match=r"'parti': attention_pattern=\['row'\] must be a string"):
    model_folder.load(folder)


@pytest.mark.parametrize('value', [1, 'yes', None, {}])
def test_whether_a_mismatch_is_allowed_is_true_or_false(folder, value):
  write(folder, CONFIG | {'mismatch_allowed': value})
  with pytest.raises(UserError, match='config.json: mismatch_allowed=.* must be true or false'):
    model_folder.load(folder)


def test_the_name_of_another_networks_size_is_refused(folder):
  write(folder, edited(('tokenizer', 'attention_pattern'), 'row'))
  with pytest.raises(UserError, match='other fields than ViTVQGANConfig: attention_pattern'):
    model_folder.load(folder)


def test_a_config_that_loads_can_sample(folder, tmp_path, capsys):
  reference = parti_jax.load().generate('red apple', num_images=1, temperature=0)
  config = edited(('parti', 'dropout'), 0)
  config['sampling'] = {'temperature': 1e-39, 'guidance_scale': 1.5}
  config['provenance'] = {}
  del config['parameters']
  write(folder, config)
  drawn = parti_jax.load(folder).generate('red apple', num_images=1)
  assert (drawn.images == reference.images).all()
  write(folder, edited(('sampling', 'guidance_scale'), 1e300))
  out = pathlib.Path(tmp_path) / 'out'
  assert main.main(['generate', 'red apple', f'--model={folder}', f'--output_dir={out}']) == 2
  assert re.search(
    r'error: .*config.json: sampling.guidance_scale=1e\+300 is not a finite number',
    capsys.readouterr().err,
  )
  assert not out.exists()
