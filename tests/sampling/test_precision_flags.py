"""`weights` and `cache`: the values that they take, in Python and as flags of the commands."""

import pytest

import parti_jax
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.sampling import images

both = pytest.mark.parametrize('setting', ['weights', 'cache'])


@both
@pytest.mark.parametrize('value', ['int4', 8, None, ''])
def test_an_unknown_value(tiny_folder, setting, value):
  with pytest.raises(UserError, match=f'^{setting}=.* is not one of float, int8$'):
    parti_jax.load(tiny_folder, **{setting: value})


@both
@pytest.mark.parametrize(
  'command',
  [
    ['generate', 'red apple'],
    ['prompts', 'nowhere.tsv'],
    ['evaluate'],
    ['plan', '--topology=cpu:1', '--what=sample'],
  ],
)
def test_an_unknown_value_of_the_flag_is_one_line(command, setting, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main.main([*command, f'--{setting}=int4']) == 2
  error = capsys.readouterr().err
  assert f"{setting}='int4' is not one of float, int8" in error and error.count('\n') == 1
  assert not list(tmp_path.iterdir())


@both
def test_the_command(tiny_folder, setting, tmp_path, monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', 'off')
  flags = ['--model', str(tiny_folder), '--output_dir', str(tmp_path), '--num_images=1']
  assert main.main(['generate', 'red apple', *flags, f'--{setting}=int8']) == 0
  picture = next(tmp_path.glob('*_0.png'))
  assert images.read_metadata(picture)[setting] == 'int8'
