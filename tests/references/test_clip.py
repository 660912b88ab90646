"""CLIP and its readers against transformers and open_clip, with random weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
open_clip = pytest.importorskip('open_clip')

from references import rankers  # noqa: E402

from parti_jax.core.errors import UserError  # noqa: E402
from parti_jax.importers import clip as reader  # noqa: E402
from parti_jax.importers import files  # noqa: E402
from parti_jax.models import clip  # noqa: E402

VOCABULARY, LENGTH = 60, 11


def _transformers_config(activation='quick_gelu', end_id=VOCABULARY - 1, image_size=25):
  return transformers.CLIPConfig(
    text_config={
      'vocab_size': VOCABULARY,
      'hidden_size': 12,
      'intermediate_size': 20,
      'num_hidden_layers': 3,
      'num_attention_heads': 3,
      'max_position_embeddings': LENGTH,
      'hidden_act': activation,
      'eos_token_id': end_id,
    },
    vision_config={
      'hidden_size': 16,
      'intermediate_size': 40,
      'num_hidden_layers': 2,
      'num_attention_heads': 2,
      'image_size': image_size,
      'patch_size': 6,
      'hidden_act': activation,
    },
    projection_dim=10,
  )


def _of_transformers(folder, **changes):
  """A model in a folder of its own, with config.json and model.safetensors."""
  model = rankers.randomize(transformers.CLIPModel(_transformers_config(**changes)), torch)
  model.save_pretrained(folder)
  return model, json.loads((folder / 'config.json').read_text())


def _check_same(module, params, model, config, pad):
  images = rankers.pictures(3, config.image_size)
  texts = rankers.texts(4, LENGTH, config.end_id, pad)
  normalized = (images - np.array(config.pixel_mean)) / np.array(config.pixel_std)
  with torch.no_grad():
    theirs = model(
      input_ids=torch.tensor(texts).long(),
      pixel_values=torch.tensor(normalized.transpose(0, 3, 1, 2)).float(),
    )
  ours = rankers.apply(module, params, images, texts)
  np.testing.assert_allclose(ours['image_features'], theirs.image_embeds, atol=1e-5)
  np.testing.assert_allclose(ours['text_features'], theirs.text_embeds, atol=1e-5)
  np.testing.assert_allclose(ours['logits'], theirs.logits_per_image, atol=1e-4)
  # The features tell pictures apart, so that the comparison says something.
  assert np.abs(np.diff(ours['image_features'], axis=0)).max() > 0.01
  assert np.abs(np.diff(ours['text_features'], axis=0)).max() > 0.01


@pytest.mark.parametrize(
  'activation, end_id, pad',
  [('quick_gelu', 2, VOCABULARY - 1), ('gelu', VOCABULARY - 1, 0), ('gelu_pytorch_tanh', 57, 57)],
)
def test_transformers(tmp_path, activation, end_id, pad):
  model, settings = _of_transformers(tmp_path, activation=activation, end_id=end_id)
  arrays = files.open_weights([str(tmp_path)]).arrays
  config = reader.config_of(arrays, settings)
  assert config.end_id == (VOCABULARY - 1 if end_id == 2 else end_id)
  assert (config.image_heads, config.text_heads, config.image_size) == (2, 3, 25)
  assert config.activation == {'gelu_pytorch_tanh': 'gelu_tanh'}.get(activation, activation)
  config = clip.CLIPConfig(**{**vars(config), 'dtype': 'float32'})
  module = clip.CLIP(config)
  params = rankers.read(
    reader.key_map, module, clip.example_inputs, config, [tmp_path], reader.IGNORED
  )
  _check_same(module, params, model, config, pad)


@pytest.mark.parametrize('container', ['model.pt', 'pytorch_model.bin'])
def test_transformers_in_a_file_of_torch(tmp_path, container):
  model, settings = _of_transformers(tmp_path / 'saved')
  state = model.state_dict()
  # As in the files from before transformers 4.31.
  state['text_model.embeddings.position_ids'] = torch.arange(LENGTH)[None]
  torch.save({'state_dict': state} if container == 'model.pt' else state, tmp_path / container)
  arrays = files.open_weights([str(tmp_path / container)]).arrays
  config = reader.config_of(arrays, settings)
  config = clip.CLIPConfig(**{**vars(config), 'dtype': 'float32'})
  module = clip.CLIP(config)
  params = rankers.read(
    reader.key_map, module, clip.example_inputs, config, [tmp_path / container], reader.IGNORED
  )
  _check_same(module, params, model, config, 0)


@pytest.mark.parametrize('saved', ['CLIPModel', 'CLIPTextModel', 'CLIPTextModelWithProjection'])
def test_the_text_encoder(tmp_path, saved):
  model, settings = _of_transformers(tmp_path, activation='gelu')
  path = tmp_path
  if saved != 'CLIPModel':
    text = getattr(transformers, saved)(model.config.text_config)
    inner = text if saved == 'CLIPTextModel' else text.text_model
    inner.load_state_dict(model.text_model.state_dict())
    path = tmp_path / 'text'
    text.save_pretrained(path)
    settings = json.loads((path / 'config.json').read_text())
  arrays = files.open_weights([str(path)]).arrays
  config = reader.text_config_of(arrays, settings)
  config = clip.CLIPTextConfig(**{**vars(config), 'dtype': 'float32'})
  module = clip.CLIPTextEncoder(config)
  params = rankers.read(
    reader.text_key_map, module, clip.example_text, config, [path], reader.IGNORED_BY_TEXT
  )
  # Shorter ones than the table of positions has, too.
  for length in (LENGTH, LENGTH - 4):
    texts = rankers.texts(4, length, config.end_id)
    with torch.no_grad():
      theirs = model.text_model(torch.tensor(texts).long()).last_hidden_state
    ours = rankers.apply(module, params, texts)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def _open_clip_model(quick_gelu, custom):
  settings = {
    'embed_dim': 10,
    'quick_gelu': quick_gelu,
    'vision_cfg': {
      'image_size': 25,
      'layers': 2,
      'width': 16,
      'head_width': 8,
      'patch_size': 6,
      'mlp_ratio': 2.5,
    },
    'text_cfg': {
      'context_length': LENGTH,
      'vocab_size': VOCABULARY,
      'width': 12,
      'heads': 3,
      'layers': 3,
    },
  }
  kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
  return rankers.randomize(kind(**settings), torch), settings


@pytest.mark.parametrize('custom', [False, True])
@pytest.mark.parametrize('quick_gelu', [False, True])
@pytest.mark.parametrize('container', ['state_dict', 'module', 'plain'])
def test_open_clip(tmp_path, custom, quick_gelu, container):
  model, model_cfg = _open_clip_model(quick_gelu, custom)
  state = model.state_dict()
  saved = {
    'state_dict': {'epoch': 3, 'name': 'x', 'state_dict': state},
    'module': {
      'state_dict': {f'module.{name}': value for name, value in state.items()},
      'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}},
    },
    'plain': state,
  }[container]
  path = tmp_path / 'weights.pt'
  torch.save(saved, path)
  arrays = files.open_weights([str(path)]).arrays
  preprocess_cfg = {'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6]}
  settings = {'model_cfg': model_cfg, 'preprocess_cfg': preprocess_cfg}
  if container == 'plain':
    settings = model_cfg
  config = reader.config_of(arrays, settings)
  assert config.activation == ('quick_gelu' if quick_gelu else 'gelu')
  if container != 'plain':
    assert (config.pixel_mean, config.pixel_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  assert reader.preprocessing_of(arrays, config, settings).crop_rounding == 'even'
  config = clip.CLIPConfig(**{**vars(config), 'dtype': 'float32'})
  module = clip.CLIP(config)
  params = rankers.read(reader.key_map, module, clip.example_inputs, config, [path], reader.IGNORED)
  images = rankers.pictures(3, 25)
  texts = rankers.texts(4, LENGTH, VOCABULARY - 1)
  normalized = (images - np.array(config.pixel_mean)) / np.array(config.pixel_std)
  with torch.no_grad():
    logits, _ = model.get_logits(
      torch.tensor(normalized.transpose(0, 3, 1, 2)).float(), torch.tensor(texts).long()
    )
    features = model.encode_text(torch.tensor(texts).long(), normalize=True)
  ours = rankers.apply(module, params, images, texts)
  np.testing.assert_allclose(ours['text_features'], features, atol=1e-5)
  np.testing.assert_allclose(ours['logits'], logits, atol=1e-4)


def test_open_clips_text_encoder_alone(tmp_path):
  model, settings = _open_clip_model(False, False)
  torch.save(model.state_dict(), tmp_path / 'weights.pt')
  arrays = files.open_weights([str(tmp_path / 'weights.pt')]).arrays
  config = reader.text_config_of(arrays, settings)
  config = clip.CLIPTextConfig(**{**vars(config), 'dtype': 'float32'})
  module = clip.CLIPTextEncoder(config)
  params = rankers.read(
    reader.text_key_map,
    module,
    clip.example_text,
    config,
    [tmp_path / 'weights.pt'],
    reader.IGNORED_BY_TEXT,
  )
  texts = rankers.texts(2, LENGTH, config.end_id)
  encoded = rankers.apply(module, params, texts)
  ends = clip.end_positions(jnp.asarray(texts), config.end_id)
  with torch.no_grad():
    theirs = model.encode_text(torch.tensor(texts).long())
    ours = torch.tensor(np.asarray(encoded)[np.arange(2), ends]) @ model.text_projection
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_config_of_old_sections(tmp_path):
  """A `text_config_dict` replaces all of `text_config`, by the defaults of transformers, too."""
  _, settings = _of_transformers(tmp_path, activation='gelu')
  arrays = files.open_weights([str(tmp_path)]).arrays
  for part in ('text', 'vision'):
    settings[f'{part}_config_dict'] = {
      key: settings[f'{part}_config'][key]
      for key in ('hidden_size', 'num_attention_heads', 'image_size', 'eos_token_id')
      if key in settings[f'{part}_config']
    }
  theirs = transformers.CLIPConfig(**settings)
  config = reader.config_of(arrays, settings)
  assert config.activation == theirs.text_config.hidden_act == 'quick_gelu'
  assert config.text_heads == theirs.text_config.num_attention_heads == 3


def test_an_activation_must_be_known():
  model = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config={'hidden_size': 64, 'num_hidden_layers': 1, 'num_attention_heads': 1},
      vision_config={'hidden_size': 64, 'num_hidden_layers': 1, 'num_attention_heads': 1},
    )
  )
  arrays = model.state_dict()
  with pytest.raises(UserError, match="'quick_gelu'.*'gelu'.*give its config.json, or say which"):
    reader.config_of(arrays)
  config = reader.config_of(arrays, activation='gelu')
  assert (config.activation, config.image_heads, config.text_heads) == ('gelu', 1, 1)
