"""The table of parts that `parti-jax import` reads, on the names and shapes of published files."""

import pytest
from importers import published

from parti_jax.cli import importable_parts
from parti_jax.cli.import_formats import formats
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.exported_model import preprocessing
from parti_jax.importers import files
from parti_jax.importers import key_map


@pytest.mark.parametrize(
  'file_format, manifest, has_config, how',
  [
    ('clip', 'clip_vit_base_patch32', True, preprocessing.Preprocessing()),
    ('clip', 'pickscore_v1', True, preprocessing.Preprocessing()),
    (
      'open_clip',
      'open_clip_vit_h_14',
      True,
      preprocessing.Preprocessing(crop_rounding='even'),
    ),
    ('hpsv2', 'open_clip_vit_h_14', False, preprocessing.Preprocessing('pad')),
    (
      'siglip2',
      'siglip2_base_patch16_256',
      False,
      preprocessing.Preprocessing('stretch', 'bilinear'),
    ),
  ],
)
def test_published_rankers(file_format, manifest, has_config, how):
  settings, arrays = published.read(manifest)
  given = formats.Given(
    files.Weights((), arrays),
    file_format,
    dict.fromkeys(formats.FLAGS),
    settings if has_config else None,
  )
  found = importable_parts.PARTS['ranker'].formats[file_format]
  config = found.config_of(given)
  shapes = parameter_files.shapes(model_folder.abstract('ranker', config))
  key_map.check(found.key_map(given, config), arrays, shapes, manifest, found.ignored(given))
  assert found.preprocessing(given, config) == how


def test_parts_are_networks_of_folders_and_formats_are_of_one_part():
  assert set(importable_parts.PARTS) <= set(model_folder.NETWORKS)
  assert len(importable_parts.FORMATS) == len(set(importable_parts.FORMATS))
  for part in importable_parts.PARTS.values():
    for found in part.formats.values():
      assert set(found.flags) <= set(formats.FLAGS)
      assert ('vocabulary' in found.flags) == (found.tokenizer is not None)
