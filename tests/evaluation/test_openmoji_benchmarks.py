"""OpenMoji in the forms of ImageNet and GenEval: drawn, judged, and shown as a table."""

import argparse
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import prompts as prompts_lib
from parti_jax.core import gin_config
from parti_jax.data import class_names
from parti_jax.data import datasets
from parti_jax.data import openmoji
from parti_jax.data import openmoji_scenes

sys.path.append(str(pathlib.Path(__file__).parents[2] / 'benchmarks'))

import geneval_scenes  # noqa: E402
import openmoji_classes  # noqa: E402

SIZE = 64


class Painter:
  """A model that draws the scene of each prompt, or another one for some of its pictures."""

  image_size, ranker, model_name = SIZE, None, 'painter'

  def __init__(self, scenes, wrong):
    self.scenes, self.wrong = scenes, wrong

  def encode_prompts(self, prompts):
    assert all(prompts)

  def generate(self, prompts, num_images, first_index, **unused):
    images = []
    for prompt, first in zip(prompts, first_index):
      row = [
        openmoji_scenes.render(self.scenes[prompt], SIZE)
        if (first + index) % self.wrong
        else np.zeros((SIZE, SIZE, 3), np.uint8)
        for index in range(num_images)
      ]
      images.append(row)
    return argparse.Namespace(images=np.array(images, np.uint8))


def test_scenes_as_geneval(tmp_path, monkeypatch):
  metadata = tmp_path / 'evaluation_metadata.jsonl'
  geneval_scenes.main(['prompts', str(metadata), '--number=12'])
  rows = [json.loads(line) for line in metadata.read_text().splitlines()]
  assert len(rows) == 12 and len({row['tag'] for row in rows}) > 2
  scenes = {
    row['prompt']: openmoji_scenes.Scene.from_json(json.dumps(row['scene'])) for row in rows
  }
  # Every fourth picture, the first of each prompt, is black.
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None: Painter(scenes, wrong=4)
  )

  def run(*arguments):
    parser = argparse.ArgumentParser()
    prompts_lib.add_arguments(parser)
    return prompts_lib.run(parser.parse_args([*map(str, arguments)]))

  run(metadata, '--format=geneval', f'--output_dir={tmp_path}/out')
  results = tmp_path / 'results.jsonl'
  geneval_scenes.main(['judge', str(tmp_path / 'out' / 'images'), '--outfile', str(results)])
  run('--results', f'geneval={results}', f'--output_dir={tmp_path}/table')
  found = json.loads((tmp_path / 'table' / 'geneval.json').read_text())
  values = {name: value['value'] for name, value in found['values'].items()}
  assert set(values) == {row['tag'] for row in rows} | {'overall'}
  # At 64 pixels, the judge finds nearly all of the real pictures right.
  assert 65 <= values['overall'] <= 75
  assert found['protocol']['counts']['overall']['pictures'] == 4 * 12


@pytest.mark.parametrize('count', [10, 1000])
def test_openmoji_as_classes(count, tmp_path, monkeypatch):
  rendered = []
  render = openmoji.render

  def counted(code, size):
    rendered.append(code)
    # Rendering a thousand names takes a minute; a few tell as much.
    return render(code, size) if len(rendered) < 20 else np.full((size, size, 3), 255, np.uint8)

  monkeypatch.setattr(openmoji, 'render', counted)
  openmoji_classes.main([str(tmp_path), f'--classes={count}', '--size=16'])
  classes = class_names.read(str(tmp_path / 'classes.txt'))
  texts = classes.texts('name')
  assert len(set(texts)) == count == len(list((tmp_path / 'train').iterdir()))
  known = {picture.name.replace(',', ''): picture for picture in openmoji.pictures()}
  assert all(known[text].split != 'validation' for text in texts)
  gin_config.parse(
    ['gin_configs/tasks/imagenet.gin'],
    [f"classes.path = '{tmp_path}'", f"classes.names = '{tmp_path}/classes.txt'"],
  )
  found = [caption for caption, _ in datasets.pictures_and_captions('classes', 'train', 16)]
  assert set(found) == set(texts)
  expected = {text: 0 for text in texts}
  for picture in openmoji.pictures():
    if picture.split == 'train' and picture.name.replace(',', '') in expected:
      expected[picture.name.replace(',', '')] += 1
  assert {text: found.count(text) for text in texts} == expected
  if count == 10:
    assert len(found) >= 50 and Image.open(next((tmp_path / 'train').rglob('*.png'))).size == (
      16,
      16,
    )
    validation = [c for c, _ in datasets.pictures_and_captions('classes', 'validation', 16)]
    assert set(validation) <= set(texts)
