"""Folders that are replaced: their paths, links, and what must not be replaced."""

import json
import os
import pathlib

import pytest

from parti_jax.core.errors import UserError
from parti_jax.exported_model import target_folder

FILES = ('config.json', 'generator.safetensors')


@pytest.fixture
def model(tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  config = {'format_version': 2, 'parameters': {'stored_as': 'float16', 'generator': 3}}
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'generator.safetensors').write_text('old')
  (folder / 'notes.txt').write_text('kept')
  return folder


@pytest.mark.parametrize('path', ['model/../model/.', 'model', '.', 'link'])
def test_a_folder_is_replaced_by_any_of_its_paths(model, path, monkeypatch):
  (model.parent / 'link').symlink_to(model)
  monkeypatch.chdir(model if path == '.' else model.parent)
  with target_folder.filled(pathlib.Path(path), FILES) as temporary:
    (temporary / 'config.json').write_text('new')
  assert (model / 'config.json').read_text() == 'new'
  assert (model / 'notes.txt').read_text() == 'kept'
  assert not (model / 'generator.safetensors').exists()
  assert sorted(os.listdir(model.parent)) == ['link', 'model']
  assert (model.parent / 'link').is_symlink()


def test_an_error_leaves_the_folder_as_it_was(model):
  with pytest.raises(ZeroDivisionError):
    with target_folder.filled(model / '..' / 'model', FILES):
      raise ZeroDivisionError
  assert (model / 'generator.safetensors').read_text() == 'old'
  assert os.listdir(model.parent) == ['model']


def test_a_config_of_another_library_is_not_replaced(model):
  (model / 'config.json').write_text(json.dumps({'model_type': 't5'}))
  with pytest.raises(UserError, match='is not of parti_jax; choose another folder'):
    target_folder.check(model, overwrite=True)


def test_a_part_does_not_replace_a_model(model):
  target_folder.check(model, overwrite=True)
  target_folder.check(model, overwrite=True, part='generator')
  with pytest.raises(
    UserError, match='is a model with generator, which a text encoder alone would'
  ):
    target_folder.check(model, overwrite=True, part='text_encoder')


def test_a_damaged_model_may_be_replaced(model):
  (model / 'config.json').write_text('{')
  target_folder.check(model, overwrite=True)
  with pytest.raises(UserError, match='exists; choose another one'):
    target_folder.check(model, overwrite=False)
