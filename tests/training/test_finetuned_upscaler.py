"""Super-resolution that starts from an imported Real-ESRGAN."""

import re

import flax.traverse_util
import numpy as np
import pytest

from parti_jax.cli import main
from parti_jax.exported_model import model_folder
from parti_jax.importers import real_esrgan as importer
from parti_jax.models import real_esrgan

NETWORKS = {
  'RRDBNetConfig': real_esrgan.RRDBNetConfig(
    factor=2, blocks=1, width=8, growth=4, unshuffle=2, dtype='float32'
  ),
  'SRVGGNetCompactConfig': real_esrgan.SRVGGNetCompactConfig(
    factor=2, layers=1, width=8, dtype='float32'
  ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_from_an_imported_folder_to_an_exported_part(name, tokenizer_bindings, tmp_path, capsys):
  config = NETWORKS[name]
  draw = np.random.default_rng(0)
  arrays = {
    path: draw.normal(0, 0.05, shape).astype(np.float32)
    for path, shape in importer.expected(config).items()
  }
  params = flax.traverse_util.unflatten_dict(arrays, sep='/')
  part = model_folder.Part(config, params)
  folder = model_folder.save_part(tmp_path / 'imported', 'super_resolution', part, {})
  sizes = {'RRDBNetConfig': ('blocks', 'width', 'growth', 'unshuffle')}.get(
    name, ('layers', 'width')
  )
  train = [
    'train',
    '--gin_file=gin_configs/runs/real_esrgan_x4plus.gin',
    '--gin_file=gin_configs/tasks/folder.gin',
    *(f'--gin.{binding}' for binding in tokenizer_bindings),
    f"--gin.train.initial_model='{folder}'",
    '--gin.train.steps=2',
    '--gin.train.batch_size=8',
    '--gin.warmup_cosine.warmup_steps=1',
    f'--gin.SuperResolutionObjective.model=@{name}()',
    '--gin.SuperResolutionObjective.tokenizer=None',
    '--gin.SuperResolutionObjective.image_size=32',
    '--gin.SuperResolutionObjective.crop=8',
    f'--gin.{name}.factor=2',
    *(f'--gin.{name}.{size}={getattr(config, size)}' for size in sizes),
  ]
  other = f'--gin.{name}.width=16'
  assert main.main([*train, other, f'--model_dir={tmp_path}/other']) == 2
  assert 'width' in capsys.readouterr().err
  assert main.main([*train, f'--model_dir={tmp_path}/run']) == 0
  printed = capsys.readouterr()
  assert 'clean_psnr' in dict(re.findall(r'validation/(\w+) ([\d.]+)', printed.out + printed.err))
  export = ['export', '--base=parti_jax/demo', f'--super_resolution={tmp_path}/run']
  assert main.main([*export, f'--output_dir={tmp_path}/model', '--dtype=float32']) == 0
  trained = model_folder.load_part('super_resolution', tmp_path / 'model')
  assert trained.config.factor == 2
  found = flax.traverse_util.flatten_dict(trained.params, sep='/')
  moved = {path: np.abs(np.asarray(found[path]) - array).max() for path, array in arrays.items()}
  # Adam moves each parameter by about the learning rate in a step.
  assert 0 < min(moved.values()) and max(moved.values()) < 1e-3
