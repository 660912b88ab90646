"""Tests model folders: round trips, and messages that name the fault."""

import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import text_to_image


def edit_config(folder, edit):
  path = folder / model_folder.CONFIG_FILE
  config = json.loads(path.read_text())
  edit(config)
  path.write_text(json.dumps(config))


def edit_parameters(folder, edit, name='generator.safetensors'):
  arrays = safetensors.numpy.load_file(folder / name)
  edit(arrays)
  safetensors.numpy.save_file(arrays, folder / name)


@pytest.fixture
def folder(parts, tmp_path):
  return model_folder.save(tmp_path / 'model', **parts)


@pytest.mark.parametrize(
  'dtype, tolerance', [('float32', 0.0), ('float16', 1e-3), ('bfloat16', 1e-2)]
)
def test_round_trip(parts, tmp_path, dtype, tolerance):
  folder = model_folder.save(tmp_path / 'model', dtype=dtype, **parts)
  model = model_folder.load(folder)
  for part in ('generator_config', 'tokenizer_config', 'sampling', 'provenance'):
    assert getattr(model, part) == parts[part]
  assert sorted(os.listdir(folder)) == sorted(model_folder.FILES)
  assert model.vocabulary_path.read_bytes() == parts['vocabulary_path'].read_bytes()
  for part in ('generator_params', 'tokenizer_params'):
    loaded, saved = getattr(model, part), parts[part]
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved)):
      assert ours.dtype == np.float32
      np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance / 10)
  stored = safetensors.numpy.load_file(folder / 'generator.safetensors')
  assert {str(leaf.dtype) for leaf in stored.values()} == {dtype}
  assert stored['image_decoder/decoder/layers/mlp/project_in/kernel'].shape == (2, 16, 32)
  sizes = json.loads((folder / model_folder.CONFIG_FILE).read_text())['parameters']
  assert sizes['generator'] == sum(leaf.size for leaf in stored.values())


def test_settings_missing_in_an_older_folder_are_off(folder):
  edit_config(folder, lambda config: config.update(sampling={'guidance_scale': 2.5}))
  sampling = model_folder.load(folder).sampling
  assert sampling == sampling_settings.SamplingSettings(guidance_scale=2.5)
  assert sampling.guidance_scales(3).tolist() == [2.5] * 3


def test_an_existing_folder_is_only_replaced_when_asked(parts, folder, tmp_path):
  with pytest.raises(UserError, match='exists'):
    model_folder.save(folder, **parts)
  (folder / 'ATTRIBUTION.md').write_text('thanks')
  model_folder.save(folder, overwrite=True, **parts | {'provenance': {'data': 'new'}})
  assert model_folder.load(folder).provenance == {'data': 'new'}
  assert (folder / 'ATTRIBUTION.md').read_text() == 'thanks'
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'letter.txt').write_text('mine')
  with pytest.raises(UserError, match="isn't a model folder"):
    model_folder.save(other, overwrite=True, **parts)
  assert (other / 'letter.txt').read_text() == 'mine'


def test_nothing_is_left_of_a_failed_save(parts, folder, tmp_path):
  with pytest.raises(UserError, match='nowhere.model cannot be read'):
    model_folder.save(
      folder, overwrite=True, **parts | {'vocabulary_path': tmp_path / 'nowhere.model'}
    )
  assert os.listdir(tmp_path) == ['model']
  assert model_folder.load(folder).provenance == parts['provenance']


def test_values_that_do_not_fit_the_dtype_are_refused(parts, tmp_path):
  large = jax.tree.map(lambda leaf: np.array(leaf), parts['generator_params'])
  large['image_decoder']['begin'][3] = 1e6
  with pytest.raises(UserError, match='image_decoder/begin.*float16'):
    model_folder.save(tmp_path / 'model', **parts | {'generator_params': large})
  assert not os.listdir(tmp_path)
  model_folder.save(tmp_path / 'model', dtype='float32', **parts | {'generator_params': large})


def test_another_dtype_is_refused(parts, tmp_path):
  with pytest.raises(UserError, match="dtype='int8'"):
    model_folder.save(tmp_path / 'model', dtype='int8', **parts)


def test_missing_folder(tmp_path):
  with pytest.raises(UserError, match='the model folder .*nowhere does not exist'):
    model_folder.load(tmp_path / 'nowhere')
  with pytest.raises(UserError, match="isn't a model folder"):
    model_folder.load(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='checkpoints of a run; `parti-jax export`'):
    model_folder.load(tmp_path)


@pytest.mark.parametrize('name', model_folder.FILES)
def test_missing_file(folder, name):
  (folder / name).unlink()
  with pytest.raises(UserError, match=f'unfinished: {name} missing'):
    model_folder.load(folder)


@pytest.mark.parametrize(
  'name', [model_folder.CONFIG_FILE, 'generator.safetensors', 'tokenizer.safetensors']
)
def test_half_a_file(folder, name):
  content = (folder / name).read_bytes()
  (folder / name).write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=f'{name} is damaged or unfinished'):
    model_folder.load(folder)


def test_another_format_version(folder):
  edit_config(folder, lambda config: config.update(format_version=99))
  with pytest.raises(UserError, match='format_version is 99, but this parti_jax reads 1 and 2'):
    model_folder.load(folder)


def test_a_folder_of_version_1_has_another_name_for_the_generator(folder, parts):
  def edit(config):
    config['format_version'] = 1
    config['parti'] = config.pop('generator')

  before = model_folder.load(folder)
  edit_config(folder, edit)
  old = folder / 'parti.safetensors'
  (folder / 'generator.safetensors').rename(old)
  after = model_folder.load(folder)
  assert after.generator_config == before.generator_config
  jax.tree.map(np.testing.assert_array_equal, after.generator_params, before.generator_params)
  edit_config(folder, lambda config: config['parti'].update(heads=3))
  with pytest.raises(UserError, match='parti.heads=3'):
    model_folder.load(folder)
  model_folder.save(folder, overwrite=True, **parts)
  assert not old.exists() and (folder / 'generator.safetensors').exists()


def test_parameters_that_differ_are_named(folder):
  def edit(arrays):
    del arrays['image_decoder/begin']
    arrays['image_decoder/more'] = np.zeros(3, np.float16)
    arrays['text_encoder/token_embedding/table'] = np.zeros((2, 2), np.float16)

  edit_parameters(folder, edit)
  with pytest.raises(UserError) as error:
    model_folder.load(folder)
  message = str(error.value)
  assert 'image_decoder/begin is missing' in message
  assert 'image_decoder/more is not part of the network' in message
  assert 'text_encoder/token_embedding/table is [2, 2] instead of [' in message
  assert '\n' not in message


def test_many_parameters_that_differ_are_counted(folder):
  edit_config(folder, lambda config: config['generator'].update(width=32))
  with pytest.raises(UserError, match=r'; [^;]* instead of [^;]*, and \d+ more$') as error:
    model_folder.load(folder)
  assert str(error.value).count(';') == 4


@pytest.mark.parametrize(
  'edit, message',
  [
    (lambda config: config.pop('tokenizer'), "'tokenizer' is missing"),
    (lambda config: config['generator'].update(depth=3), 'other fields than PartiConfig: depth'),
    (lambda config: config['generator'].update(heads=3), 'heads=3'),
    (lambda config: config['generator'].update(codebook_size=13), 'another tokenizer'),
    (lambda config: config['sampling'].update(top_p=2), 'top_p=2'),
    (lambda config: config['sampling'].update(speed=2), 'speed'),
  ],
)
def test_invalid_sizes(folder, edit, message):
  edit_config(folder, edit)
  with pytest.raises(UserError, match=message):
    model_folder.load(folder)


@pytest.fixture
def folder_with_part(parts, enlarger, tmp_path):
  return model_folder.save(
    tmp_path / 'more', parts={'super_resolution': enlarger}, dtype='float32', **parts
  )


def test_an_optional_part_is_restored(folder_with_part, enlarger, parts, folder):
  model = model_folder.load(folder_with_part)
  assert list(model.parts) == ['super_resolution']
  assert model.parts['super_resolution'].config == enlarger.config
  jax.tree.map(
    np.testing.assert_array_equal, model.parts['super_resolution'].params, enlarger.params
  )
  jax.tree.map(np.testing.assert_array_equal, model.generator_params, parts['generator_params'])
  assert model.stored_as == 'float32' and model_folder.load(folder).stored_as == 'float16'
  # A model saved without the part has none, even if the folder had one before.
  assert not model_folder.load(folder).parts
  model_folder.save(folder_with_part, overwrite=True, **parts)
  assert not model_folder.load(folder_with_part).parts
  assert sorted(os.listdir(folder_with_part)) == sorted(model_folder.FILES)


def test_an_optional_part_that_is_unfinished_is_named(folder_with_part):
  path = folder_with_part / 'super_resolution.safetensors'
  content = path.read_bytes()
  path.unlink()
  with pytest.raises(UserError, match='unfinished: super_resolution.safetensors missing'):
    model_folder.load(folder_with_part)
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match='super_resolution.safetensors is damaged or unfinished'):
    model_folder.load(folder_with_part)
  path.write_bytes(content)
  edit_config(folder_with_part, lambda config: config['super_resolution'].update(width=5))
  with pytest.raises(UserError, match='super_resolution.safetensors does not fit the sizes'):
    model_folder.load(folder_with_part).parts['super_resolution']
  edit_config(folder_with_part, lambda config: config.pop('super_resolution'))
  with pytest.raises(UserError, match="'super_resolution' is missing"):
    model_folder.load(folder_with_part)


@pytest.mark.parametrize(
  'edit, message',
  [
    (
      lambda config: config['generator'].update(decoder_layers=10**9),
      'decoder_layers=1000000000 is mo',
    ),
    (
      lambda config: config['generator'].update(text_length=2**40),
      'text_length=1099511627776 is more',
    ),
    (lambda config: config['generator'].update(width=-16), 'width=-16'),
    (lambda config: config['generator'].update(dropout=float('nan')), 'dropout=nan'),
    (lambda config: config['generator'].update(grid=[2**30, 2]), 'grid=1073741824 is more'),
    (lambda config: config['tokenizer'].update(image_size='64'), "image_size='64'"),
    (lambda config: config['tokenizer'].update(image_size=2**20), 'image_size|sizes|tokenizer'),
  ],
)
def test_sizes_from_elsewhere_take_no_memory(folder, edit, message):
  edit_config(folder, edit)
  with pytest.raises(UserError, match=message):
    model_folder.load(folder)


@pytest.mark.parametrize(
  'content, message',
  [
    ('[' * 100_000, 'nested too deeply'),
    ('{"format_version": 2, "generator": 3}', "'generator' is missing"),
    ('[1]', 'format_version is None'),
    ('\xff', 'damaged'),
    ('', 'damaged'),
  ],
)
def test_a_config_from_elsewhere(folder, content, message):
  (folder / model_folder.CONFIG_FILE).write_text(content, encoding='latin-1')
  with pytest.raises(UserError, match=message):
    model_folder.load(folder)


def test_a_config_of_too_many_bytes_is_not_read(folder, monkeypatch):
  monkeypatch.setattr(model_folder.storage.read_json, '__defaults__', (1000,))
  (folder / model_folder.CONFIG_FILE).write_text(' ' * 1001)
  with pytest.raises(UserError, match='has 1,001 bytes, but such a file may have at most 1,000;'):
    model_folder.load(folder)


def _header(**tensors):
  """Makes a safetensors file with this header and 16 bytes."""
  text = json.dumps(tensors).encode()
  return len(text).to_bytes(8, 'little') + text + bytes(16)


@pytest.mark.parametrize(
  'content',
  [
    # 100 GB of missing data, two overlapping tensors, a header longer than the file.
    _header(a={'dtype': 'F32', 'shape': [25 * 10**9], 'data_offsets': [0, 10**11]}),
    _header(
      a={'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]},
      b={'dtype': 'F32', 'shape': [2], 'data_offsets': [4, 12]},
    ),
    _header(a={'dtype': 'F32', 'shape': [2**62, 2**62], 'data_offsets': [0, 16]}),
    (2**62).to_bytes(8, 'little') + b'{}',
  ],
)
def test_parameters_from_elsewhere(folder, content):
  (folder / 'generator.safetensors').write_bytes(content)
  with pytest.raises(UserError, match='generator.safetensors is damaged'):
    model_folder.load(folder)


@pytest.mark.parametrize(
  'content', [b'', b'\x00' * 64, bytes(range(256)) * 40, b'\x0a\xff\xff\xff']
)
def test_a_vocabulary_from_elsewhere(folder, content):
  (folder / model_folder.VOCABULARY_FILE).write_bytes(content)
  with pytest.raises(UserError, match='vocabulary'):
    text_to_image.load(folder)
