"""SigLIP and its reader against transformers, with random weights."""

import json

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from references import rankers  # noqa: E402

from parti_jax.importers import files  # noqa: E402
from parti_jax.importers import siglip as reader  # noqa: E402
from parti_jax.models import siglip  # noqa: E402


@pytest.mark.parametrize('image_size', [18, 23])
@pytest.mark.parametrize('safe', [True, False])
def test_transformers(tmp_path, image_size, safe):
  model = transformers.SiglipModel(
    transformers.SiglipConfig(
      text_config={
        'vocab_size': 50,
        'hidden_size': 12,
        'intermediate_size': 20,
        'num_hidden_layers': 3,
        'num_attention_heads': 3,
        'max_position_embeddings': 9,
        'projection_size': 16,
      },
      vision_config={
        'hidden_size': 16,
        'intermediate_size': 40,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'image_size': image_size,
        'patch_size': 6,
      },
    )
  )
  rankers.randomize(model, torch)
  model.save_pretrained(tmp_path)
  settings = json.loads((tmp_path / 'config.json').read_text())
  path = tmp_path
  if not safe:
    path = tmp_path / 'pytorch_model.bin'
    torch.save(model.state_dict(), path)
  config = reader.config_of(files.open_weights([str(path)]).arrays, settings)
  assert (config.image_size, config.image_heads, config.text_heads) == (image_size, 4, 3)
  config = siglip.SigLIPConfig(**{**vars(config), 'dtype': 'float32'})
  module = siglip.SigLIP(config)
  params = rankers.read(
    reader.key_map, module, siglip.example_inputs, config, [path], reader.IGNORED
  )
  images = rankers.pictures(3, image_size)
  texts = rankers.texts(4, 9, end_id=1, largest=50)
  with torch.no_grad():
    theirs = model(
      input_ids=torch.tensor(texts).long(),
      pixel_values=torch.tensor(images.transpose(0, 3, 1, 2) * 2 - 1),
    )
  ours = rankers.apply(module, params, images, texts)
  np.testing.assert_allclose(ours['image_features'], theirs.image_embeds, atol=1e-5)
  np.testing.assert_allclose(ours['text_features'], theirs.text_embeds, atol=1e-5)
  np.testing.assert_allclose(ours['logits'], theirs.logits_per_image, atol=1e-4)
  assert np.abs(np.diff(ours['image_features'], axis=0)).max() > 0.01
  assert np.abs(np.diff(ours['text_features'], axis=0)).max() > 0.01
