"""gin: how files are found, and the error messages."""

import argparse
import collections.abc
import inspect

import gin
import pytest

from parti_jax.core import checks
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training.objectives import tokenizer_objective


@gin.configurable(module='config_test')
def train_example(steps=1, rate=0.5, model_dir=gin.REQUIRED, function=None):
  return steps, rate, model_dir, function


@gin.configurable(module='config_test', denylist=['hidden'])
class ExampleModel:
  def __init__(self, width=4, hidden=2):
    self.width, self.hidden = width, hidden


@gin.configurable(module='config_test')
def failing_example():
  raise UserError('captions.jsonl: no such file')


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
  """Uses an empty working folder, an installed folder of gin files, and no gin values."""
  installed = tmp_path / 'package' / 'gin_configs'
  (installed / 'runs').mkdir(parents=True)
  (installed / 'models').mkdir()
  (installed / 'models' / 'demo_model.gin').write_text('ExampleModel.width = 8\n')
  (installed / 'runs' / 'demo_run.gin').write_text(
    "include 'gin_configs/models/demo_model.gin'\ntrain_example.steps = 7\n"
    'train_example.function = @ExampleModel()\n'
  )
  monkeypatch.setattr(gin_config, 'folder', lambda: installed)
  work = tmp_path / 'work'
  work.mkdir()
  monkeypatch.chdir(work)
  yield
  gin.clear_config()


def _message(text=None, bindings=()):
  """Returns the message of the UserError from parsing a file of this text, then bindings."""
  files = []
  if text is not None:
    with open('mine.gin', 'w', encoding='utf-8') as file:
      file.write(text)
    files = ['mine.gin']
  with pytest.raises(UserError) as caught:
    gin_config.parse(files, bindings)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('name', ['gin_configs/runs/demo_run.gin', 'runs/demo_run.gin'])
def test_finds_installed_files_and_their_includes(name):
  gin_config.parse([name], ["train_example.model_dir='x'"])
  steps, rate, model_dir, model = train_example()
  assert (steps, rate, model_dir, model.width) == (7, 0.5, 'x', 8)


def test_a_file_in_the_working_folder_comes_first(tmp_path):
  runs = tmp_path / 'work' / 'runs'
  runs.mkdir()
  (runs / 'demo_run.gin').write_text('train_example.steps = 99\n')
  gin_config.parse(['runs/demo_run.gin'], [])
  assert train_example(model_dir='')[0] == 99
  gin_config.parse([str(runs / 'demo_run.gin')], [])
  assert train_example(model_dir='')[0] == 99


def test_later_files_and_bindings_win_and_earlier_configs_are_discarded():
  with open('mine.gin', 'w', encoding='utf-8') as file:
    file.write('train_example.steps = 8\nRATE = 3.0\ntrain_example.rate = %RATE\n')
  gin_config.parse(['runs/demo_run.gin', 'mine.gin'], [])
  assert train_example(model_dir='')[:2] == (8, 3.0)
  gin_config.parse(['runs/demo_run.gin', 'mine.gin'], ['train_example.steps=9', 'RATE=4.0'])
  assert train_example(model_dir='')[:2] == (9, 4.0)
  gin_config.parse([], [])
  assert train_example(model_dir='')[:2] == (1, 0.5)


@pytest.mark.parametrize(
  'name', ['runs/demo_rnu.gin', 'gin_configs/demo_run.gin', 'configs/demo_run.gin']
)
def test_missing_file_names_the_nearest(name, tmp_path):
  with pytest.raises(UserError) as caught:
    gin_config.parse([name], [])
  message = str(caught.value)
  assert repr(name) in message and str(tmp_path / 'package' / 'gin_configs') in message
  assert 'did you mean gin_configs/runs/demo_run.gin' in message


def test_missing_include_names_the_line():
  message = _message("\ninclude 'models/demo_modle.gin'\n")
  assert message.startswith("mine.gin:2: gin file 'models/demo_modle.gin' not found")
  assert 'did you mean gin_configs/models/demo_model.gin?' in message


def test_missing_files_are_not_logged(caplog):
  _message("include 'models/none.gin'")
  assert not caplog.records


@pytest.mark.parametrize(
  'text, start',
  [
    (
      'train_example.setps = 3',
      "mine.gin:1: unknown gin name 'train_example.setps'; did you mean train_example.steps?",
    ),
    (
      '\ntrian_example.steps = 3',
      "mine.gin:2: unknown gin name 'trian_example.steps'; did you mean train_example.steps",
    ),
    (
      'trian_example:\n  steps = 3\n',
      "mine.gin:1: unknown gin name 'trian_example'; did you mean train_example",
    ),
    (
      'train_example.function = @ExampelModel()',
      "mine.gin:1: unknown gin name 'ExampelModel'; did you mean ExampleModel?",
    ),
    (
      'ExampleModel.zzz = 1',
      "mine.gin:1: unknown gin name 'ExampleModel.zzz'; its parameters are width",
    ),
    ('ExampleModel.hidden = 1', 'mine.gin:1: ExampleModel.hidden cannot be set by gin'),
    ('import parti_jax.nothing', "mine.gin:1: No module named 'parti_jax.nothing'"),
    ('\ntrain_example.steps = 3 4', 'mine.gin:2: Expected newline. In: train_example.steps = 3 4'),
    (
      'train_example.rate = %RATE',
      'gin: the macro %RATE is used but has no value; set it with --gin.RATE=VALUE',
    ),
    (
      'RATES = 1\ntrain_example.rate = %RATE',
      'gin: the macro %RATE is used but has no value; did you mean %RATES?',
    ),
    ('train_example.steps = %gin.REQUIRED', 'mine.gin: train_example.steps set to'),
  ],
)
def test_errors_in_a_file(text, start):
  assert _message(text).startswith(start)


def test_open_bracket_names_the_file():
  message = _message('train_example.steps = (3')
  assert message.startswith('mine.gin') and 'check for an unclosed bracket' in message


@pytest.mark.parametrize(
  'binding, hint',
  [
    (
      'train_example.setps=3',
      "unknown gin name 'train_example.setps'; did you mean train_example.steps?",
    ),
    ('trian_example.steps=3', 'did you mean train_example.steps'),
    ('train_example.model_dir=x', 'a string needs quotes'),
    ('RTAE=3', "the gin files use no macro 'RTAE'; did you mean RATE?"),
    ('train_example=3', 'write --gin.NAME.PARAMETER=VALUE'),
  ],
)
def test_errors_in_a_binding_name_the_flag(binding, hint):
  message = _message('RATE = 1\ntrain_example.rate = %RATE', [binding])
  assert message.startswith(f'--gin.{binding}: ') and hint in message


def test_nothing_stays_from_a_failed_parse():
  _message('train_example.steps = 5\ntrain_example.setps = 3')
  assert train_example(model_dir='')[0] == 1


def test_missing_optional_package_in_an_import_is_left_to_main(monkeypatch):
  monkeypatch.setitem(gin_config.optional_packages.EXTRAS, 'parti_jax_absent', 'data')
  with open('mine.gin', 'w', encoding='utf-8') as file:
    file.write('import parti_jax_absent\n')
  with pytest.raises(ModuleNotFoundError):
    gin_config.parse(['mine.gin'], [])


def test_unset_required_value():
  gin_config.parse([], [])
  with pytest.raises(UserError, match=r'--gin\.train_example\.model_dir=VALUE'):
    with gin_config.translated_errors():
      train_example()


def test_other_errors_pass_through():
  with pytest.raises(RuntimeError, match='a defect'):
    with gin_config.translated_errors():
      raise RuntimeError('a defect')


def test_without_call_chain():
  with pytest.raises(UserError) as caught:
    failing_example()
  assert '\n' in str(caught.value)  # gin adds this.
  assert gin_config.without_call_chain(caught.value) == 'captions.jsonl: no such file'


def test_operative_has_the_values_in_use():
  gin_config.parse([], ['train_example.steps=6'])
  assert 'steps' not in gin_config.operative()
  train_example(model_dir='x')
  assert 'train_example.steps = 6' in gin_config.operative()


def test_arguments():
  parser = argparse.ArgumentParser()
  gin_config.add_gin_arguments(parser)
  assert parser.parse_args([]).gin_file == []
  assert parser.parse_args(['--gin_file=a', '--gin_file', 'b']).gin_file == ['a', 'b']


def test_data_settings_can_be_skipped(tmp_path, monkeypatch):
  run = tmp_path / 'run.gin'
  run.write_text('import parti_jax.data.tasks\ntrain_example.steps = 9\nfolder.path = "x"\n')
  imported = []
  monkeypatch.setattr('importlib.import_module', lambda name, *_: imported.append(name))
  gin_config.parse([str(run)], ['token_cache.path = "y"'], data=False)
  assert gin.query_parameter('train_example.steps') == 9 and not imported
  with pytest.raises(UserError, match=r'run\.gin:4: .*did you mean train_example\.steps'):
    run.write_text(run.read_text() + 'train_example.stpes = 2\n')
    gin_config.parse([str(run)], [], data=False)


def test_names_of_the_data_are_all_known():
  from parti_jax.data import datasets  # noqa: F401

  registered = {
    configurable.name
    for configurable in gin_config._configurables().values()
    if configurable.wrapped.__module__.startswith('parti_jax.data.')
  }
  assert registered == set(gin_config.DATA_NAMES)


@gin.configurable(module='config_test')
@checks.bounded(size=(1, 8), pair=(0, None))
def typed_example(
  size: int = 1,
  rate: float | None = None,
  name: str = '',
  on: bool = False,
  pair: tuple[int, int] = (0, 0),
  files: collections.abc.Mapping[str, str] = {},
  model: ExampleModel | None = None,
  free=None,
):
  return size, rate, name, on, pair, files, model, free


@pytest.mark.parametrize(
  'binding, message',
  [
    ('size=8.0', 'typed_example.size=8.0 must be a whole number from 1 to 8, such as 8'),
    ("size='8'", "typed_example.size='8' must be a whole number from 1 to 8"),
    ('size=0', 'typed_example.size=0 must be a whole number from 1 to 8'),
    ('size=9', 'typed_example.size=9 must be a whole number from 1 to 8'),
    ('size=True', 'typed_example.size=True must be a whole number from 1 to 8'),
    ('size=None', 'typed_example.size=None must be a whole number from 1 to 8'),
    ("rate='0.1'", "typed_example.rate='0.1' must be a number"),
    ('rate=1e39', 'typed_example.rate=1e+39 is not a finite number in float32'),
    ('name=3', 'typed_example.name=3 must be a string'),
    ('on=1', 'typed_example.on=1 must be true or false'),
    ('pair=(1, 2, 3)', 'typed_example.pair=(1, 2, 3) must be a list of two whole numbers from 0'),
    ('pair=3', 'typed_example.pair=3 must be a list of two whole numbers from 0'),
    ('pair=(-1, 2)', 'typed_example.pair=(-1, 2) must be a list of two whole numbers from 0'),
    ("files='a.jsonl'", "typed_example.files='a.jsonl' must be of the form {'string': 'string'}"),
    ("files={'train': None}", "must be of the form {'string': 'string'}"),
  ],
)
def test_values_of_another_type_are_named_before_anything_is_called(binding, message):
  assert _message(bindings=[f'typed_example.{binding}']).startswith(message) or (
    message in _message(bindings=[f'typed_example.{binding}'])
  )
  assert f'a/{message}' in _message(f'a/typed_example.{binding}') or message.startswith('must')


def test_macro_values_are_checked():
  assert _message('SIZE = 9\ntyped_example.size = %SIZE').startswith('typed_example.size=9 must')
  assert _message('SIZE = 9\ntyped_example.pair = (1, %SIZE, 2)').startswith(
    'typed_example.pair=(1, 9, 2) must'
  )


@pytest.mark.parametrize(
  'binding',
  [
    'size=8',
    'rate=1',
    'rate=None',
    "name='x'",
    'on=True',
    'pair=[1, 2]',
    "files={'a': 'b'}",
    'model=@ExampleModel()',
    'free=3',
    'size=@failing_example()',
  ],
)
def test_values_that_fit_pass(binding):
  gin_config.parse([], [f'typed_example.{binding}'])


def test_a_call_in_place_of_a_function_is_named():
  gin_config.parse([], ['train_example.function = @needs_more()', "train_example.model_dir = 'x'"])
  with pytest.raises(
    UserError,
    match=r'gin: @needs_more\(\) is called without .schedule.; write '
    '@needs_more, without',
  ):
    with gin_config.translated_errors():
      train_example()


@gin.configurable(module='config_test')
def needs_more(schedule):
  return schedule


def test_values_given_for_a_class_that_is_not_built_are_unused():
  with open('mine.gin', 'w', encoding='utf-8') as file:
    file.write('failing_example/ExampleModel.width = 1\nWIDTH = 2\n')
    file.write('train_example.rate = %WIDTH\n')
  bindings = ['a/config_test.ExampleModel.width = 3', 'train_example.steps = 2', 'WIDTH = 4']
  gin_config.parse(['mine.gin'], bindings)
  assert gin_config.unused(ExampleModel) == ['a/config_test.ExampleModel.width']
  assert gin_config.unused(int) == []
  ExampleModel()
  assert gin_config.unused(ExampleModel) == []
  gin_config.parse([], bindings[:1])
  gin.clear_config()
  assert gin_config.unused(ExampleModel) == []


def test_old_names_still_work_and_are_named_once(tmp_path, capsys):
  file = tmp_path / 'old.gin'
  file.write_text(
    '# GeneratorStage of a comment\ntrain.stage = @GeneratorStage()\n'
    'GeneratorStage.model = @PartiConfig()\nGeneratorStage.tokenizer = "train.stage"\n'
  )
  gin_config.parse([str(file)], ['GeneratorStage.guidance_scale = 3.0'])
  assert gin.query_parameter('GeneratorObjective.guidance_scale') == 3.0
  assert gin.query_parameter('GeneratorObjective.tokenizer') == 'train.stage'
  assert 'GeneratorObjective' in str(gin.query_parameter('train.objective'))
  shown = capsys.readouterr().err.splitlines()
  assert shown == [
    f'{file}: train.stage is now named train.objective; the old name still works',
    f'{file}: GeneratorStage is now named GeneratorObjective; the old name still works',
  ]


def test_all_new_names_exist():
  for name in gin_config.RENAMED.values():
    kind, _, parameter = name.partition('.')
    configurable = gin.config._REGISTRY.get_match(kind)
    assert configurable is not None, name
    assert not parameter or parameter in inspect.signature(configurable.wrapped).parameters


def test_t5x_gin_files_of_earlier_versions_find_the_tokenizers_losses():
  gin.parse_config("""
from __gin__ import dynamic_registration
from parti_jax.training import tokenizer_stage
tokenizer_stage.TokenizerStage.l2_weight = 2.0
""")
  bound = gin.get_bindings(tokenizer_objective.TokenizerObjective)
  assert bound['l2_weight'] == 2.0
