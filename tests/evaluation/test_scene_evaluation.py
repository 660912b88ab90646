"""`parti-jax evaluate --dataset=openmoji_scenes`, with fake models that draw scenes."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import evaluate
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes as scenes
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder
from parti_jax.evaluation.openmoji import scene_evaluation
from parti_jax.evaluation.openmoji import scene_report

SIZE = 128
_SPLITS = ('unseen_counts', 'unseen_grounds')


class FakeModel:
  """A model that draws the right scene as picture 0 of a prompt, and an empty ground otherwise."""

  image_size = SIZE
  ranker = None

  def __init__(self):
    self.scenes = {
      openmoji_grammar.captions_of(scenes.Settings(), split, index)[0]: (split, index)
      for split in _SPLITS
      for index in range(scenes.HELD_OUT_SIZE)
    }
    self.drawn = 0

  def generate(self, prompts, num_images, rank, first_index, **settings):
    assert num_images == 1 and not rank and settings['seed'] == 3
    self.drawn += len(prompts)
    images = []
    for prompt, first in zip(prompts, first_index):
      image = np.full((SIZE, SIZE, 3), 255, np.uint8)
      if first % 2 == 0:
        image = scenes.render(scenes.scene(*self.scenes[prompt]), SIZE)
      images.append([image])
    return argparse.Namespace(images=np.array(images))

  def reconstruct(self, images):
    return images


class FakeRanker:
  """Prefers dark pictures, which are those with things."""

  def scores(self, texts, images):
    assert len(texts) == len(images)
    return -images.reshape(len(images), -1).mean(axis=1)


@pytest.fixture(name='model')
def fixture_model(monkeypatch):
  model = FakeModel()
  monkeypatch.setitem(vars(parti_jax), 'load', lambda path=None, ranker=None: model)
  monkeypatch.setattr(output_folder, 'model_fingerprint', lambda folder: 'fake')
  monkeypatch.setattr(scenes, 'TRAIN_SIZE', 300)
  return model


def run(folder, *arguments):
  parser = argparse.ArgumentParser()
  evaluate.add_arguments(parser)
  flags = ['--dataset=openmoji_scenes', '--output_dir', str(folder), '--seed=3', '--num_images=2']
  return evaluate.run(parser.parse_args([*flags, *arguments]))


@pytest.fixture
def few_training_scenes(monkeypatch):
  training = list(scenes.split_scenes('train', scenes.Settings(train_size=300)))
  monkeypatch.setattr(scene_evaluation._Evaluation, 'training', training)


def test_scenes_of_seen_names(monkeypatch, model, tmp_path):
  asked = []
  monkeypatch.setattr(
    scene_evaluation, 'evaluate', lambda *_, settings, **__: asked.append(settings) or 1 / 0
  )
  for number, flags in enumerate([[], ['--of_seen_names']]):
    with pytest.raises(ZeroDivisionError):
      run(tmp_path / str(number), *flags)
  assert asked == [scenes.Settings(), scenes.Settings(of_seen_names=True)]
  # The pictures of one set of scenes are not used for the other.
  with pytest.raises(UserError, match='scenes'):
    run(tmp_path / '0', '--of_seen_names')


def test_the_report_its_rows_and_sheets(model, few_training_scenes, tmp_path, capsys):
  model.ranker = FakeRanker()
  assert run(tmp_path, '--max_prompts=12', '--rank', '--splits', *_SPLITS) == 0
  printed = capsys.readouterr().out
  content = json.loads((tmp_path / 'report.json').read_text())
  assert [split['split'] for split in content['splits']] == list(_SPLITS)
  measured = measurement.read_all(str(tmp_path / 'report.json'))
  assert len(measured) == 2 * len(_SPLITS)
  for split in content['splits']:
    rows = split['rows']
    found = measured[f'{split["split"]}/judge']
    assert found.values['task.overall'].value == rows['generated']['tasks']['overall']['mean']
    assert found.values['aspect.right'].value == 0.5
    ranked = measured[f'{split["split"]}/judge_of_ranked_first']
    assert ranked.values['aspect.right'].value == 1 and 'chosen_by' in ranked.subject
    assert ranked.protocol == found.protocol
    assert list(rows) == [
      'generated',
      'ranked_first',
      'best',
      'reconstruction',
      'nearest',
      'random',
      'real',
    ]
    means = {name: row['aspects']['right']['mean'] for name, row in rows.items()}
    assert means == {
      'generated': 0.5,
      'ranked_first': 1,
      'best': 1,
      'reconstruction': 1,
      'nearest': 0,
      'random': 0,
      'real': 1,
    }
    assert rows['real']['tasks']['overall']['mean'] == 1
    assert rows['generated']['aspects']['ground']['prompts'] == 12
    assert rows['generated']['aspects']['places'] == {
      'mean': None,
      'standard_error': None,
      'prompts': 0,
    }
    assert len(split['of_prompt']) == 12 and split['psnr'] == 100
    assert {prompt['right'] for prompt in split['of_prompt']} == {0.5}
    assert Image.open(tmp_path / f'{split["split"]}.png').width > 3 * SIZE
  assert 'unseen_counts: 12 of 200 prompts' in printed and 'counting' in printed
  assert (tmp_path / 'report.md').read_text().startswith('# Evaluation on scenes')


def test_an_interrupted_run_goes_on(model, few_training_scenes, tmp_path):
  flags = ('--max_prompts=40', '--splits', 'unseen_counts')
  run(tmp_path, *flags)
  first = (tmp_path / 'report.json').read_bytes()
  assert model.drawn == 80
  (tmp_path / 'generated' / 'unseen_counts' / '00001.tar').unlink()
  (tmp_path / 'report.json').unlink()
  run(tmp_path, *flags)
  assert model.drawn == 80 + 16 and (tmp_path / 'report.json').read_bytes() == first
  with pytest.raises(UserError, match='another run, with max_prompts 40'):
    run(tmp_path, '--max_prompts=41', '--splits', 'unseen_counts')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--splits', 'unseen_combinations'], "unknown split 'unseen_combinations'; choose from train"),
    (['--max_prompts', '0'], '--max_prompts'),
    (['--num_captions', '3'], '--num_captions only applies to'),
    (['--dataset=openmoji', '--of_seen_names'], '--of_seen_names only applies to'),
    (['--inception_weights', __file__], '--inception_weights does not apply'),
  ],
)
def test_bad_flags_leave_no_files(model, tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    run(tmp_path / 'new', *arguments)
  assert not (tmp_path / 'new').exists() and not model.drawn


def test_ranking_needs_a_ranker(model, tmp_path):
  with pytest.raises(UserError, match='--rank needs a model with a ranker'):
    run(tmp_path, '--rank')
  assert not model.drawn


def test_the_nearest_request():
  training = list(scenes.split_scenes('train', scenes.Settings(train_size=500)))
  asked = [training[7], training[401]]
  assert scene_evaluation.nearest_requests(asked, training).tolist() == [7, 401]
  assert scene_evaluation.nearest_requests(asked, training[::-1]).tolist() == [492, 98]
  unseen = [scenes.scene('unseen_pairs', index) for index in range(50)]
  for scene, index in zip(unseen, scene_evaluation.nearest_requests(unseen, training)):
    shared = {group.kind for group in scene.groups} & {g.kind for g in training[index].groups}
    assert len(shared) <= 1


def test_the_overall_score_is_the_mean_of_the_tasks(model):
  found = [scenes.scene('validation', index) for index in range(60)]
  judged = [
    scene_report.scene_judge.Verdict(right, right, None, None, None, True)
    for right in (scene.task == 'counting' for scene in found)
  ]
  row = scene_report.Row.of(found, [[verdict] for verdict in judged])
  tasks = {task: metric.mean for task, metric in row.tasks.items()}
  assert tasks.pop('overall') == pytest.approx(1 / 6)
  assert tasks == {**dict.fromkeys(scenes.TASKS, 0.0), 'counting': 1.0}
  assert row.aspects['ground'].mean == 1 and row.aspects['colors'].mean is None
