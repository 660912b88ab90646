"""Tests `parti-jax export` with a base model for the parts that no run gives."""

import json
import shutil

import numpy as np
import safetensors

from parti_jax.cli import main
from parti_jax.exported_model import model_folder
from parti_jax.sampling import text_to_image

# File in the demo's folder, of an older format version -> file in a new folder.
PARAMETERS = {
  'parti.safetensors': 'generator.safetensors',
  'tokenizer.safetensors': 'tokenizer.safetensors',
}


def test_a_base_gives_what_no_flag_gives(tmp_path, capsys):
  demo = text_to_image.DEMO_FOLDER
  assert (
    main.main(['export', f'--base={demo}', f'--output_dir={tmp_path}/model', '--temperature=0.5'])
    == 0
  )
  assert f'{tmp_path}/model: ' in capsys.readouterr().out
  for old, new in PARAMETERS.items():
    # safetensors writes metadata in any order.
    with (
      safetensors.safe_open(tmp_path / 'model' / new, 'np') as written,
      safetensors.safe_open(demo / old, 'np') as given,
    ):
      assert written.metadata() == given.metadata() and written.keys() == given.keys()
      for key in given.keys():
        np.testing.assert_array_equal(written.get_tensor(key), given.get_tensor(key))
  assert (tmp_path / 'model' / 'vocabulary.model').read_bytes() == (
    demo / 'vocabulary.model'
  ).read_bytes()
  base, model = model_folder.load(demo), model_folder.load(tmp_path / 'model')
  assert model.sampling == base.sampling.replace(temperature=0.5)
  assert model.provenance == base.provenance and model.generator_config == base.generator_config


def test_a_folder_may_be_its_own_base(tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(text_to_image.DEMO_FOLDER, folder)
  export = ['export', f'--base={folder}', f'--output_dir={folder}', '--top_k=7']
  assert main.main(export) == 2  # Replaces only what the user asked for.
  assert main.main([*export, '--overwrite']) == 0
  assert json.loads((folder / 'config.json').read_text())['sampling']['top_k'] == 7
  assert (folder / 'ATTRIBUTION.md').is_file()
  assert not (folder / 'parti.safetensors').exists()


def test_without_a_base_all_parts_are_required(tmp_path, capsys):
  assert main.main(['export', f'--tokenizer={tmp_path}', f'--output_dir={tmp_path}/model']) == 2
  assert '--generator, --vocabulary: required' in capsys.readouterr().err
