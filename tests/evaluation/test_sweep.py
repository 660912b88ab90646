"""Tests of `parti-jax evaluate --sweep` and `--rejection`."""

import argparse
import json
import math
import re
import shutil

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import evaluate
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.evaluation import line_chart
from parti_jax.evaluation import measurement
from parti_jax.evaluation import rejection
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.metrics import frechet

PICTURES = 12


def noise(caption, index):
  return np.random.default_rng([*caption.encode(), index]).integers(
    0, 256, (fakes.SIZE, fakes.SIZE, 3), dtype=np.uint8
  )


def pattern(caption, index):
  """Returns what a caption means, with more noise for larger indices."""
  noisy = index % 20 / 20
  mixed = (1 - noisy) * fakes.render(caption) + noisy * noise(caption, index)
  return mixed.round().astype(np.uint8)


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  pipeline = fakes.FakePipeline(pattern, fakes.FakeRanker(lambda text, _: fakes.render(text)))
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None, weights='float': pipeline
  )
  monkeypatch.setattr(openmoji, 'pictures', fakes.small_set)
  monkeypatch.setattr(openmoji, 'render', fakes.render)
  monkeypatch.setattr(picture_shards, 'SHARD', 8)
  return pipeline


@pytest.fixture(name='coco')
def fixture_coco(tmp_path):
  """Small files in MS-COCO's form."""
  place = tmp_path / 'val2014'
  place.mkdir()
  content = {'images': [], 'annotations': []}
  for identity in range(PICTURES):
    name = f'{identity}.png'
    Image.fromarray(fakes.render(f'picture {identity}')).save(place / name)
    content['images'].append({'id': identity, 'file_name': name})
    content['annotations'].append({'image_id': identity, 'caption': f'picture {identity}'})
  (tmp_path / 'captions.json').write_text(json.dumps(content))
  return ['--dataset=coco', f'--annotations={tmp_path}/captions.json', f'--pictures={place}']


def run(*arguments):
  parser = argparse.ArgumentParser()
  evaluate.add_arguments(parser)
  return evaluate.run(parser.parse_args(arguments))


SWEEP = ['--sweep', 'guidance_scale=1,2.5', 'top_p=0.9,1']
POINTS = [
  'guidance_scale=1,top_p=0.9',
  'guidance_scale=2.5,top_p=0.9',
  'guidance_scale=1,top_p=1',
  'guidance_scale=2.5,top_p=1',
]


def test_each_point_has_its_settings_and_the_curve_its_numbers(pipeline, coco, tmp_path, capsys):
  out = tmp_path / 'out'
  used = []
  generate = pipeline.generate

  def watched(prompts, **settings):
    used.append((settings['guidance_scale'], settings['top_p']))
    return generate(prompts, **settings)

  pipeline.generate = watched
  assert run(*coco, *SWEEP, f'--output_dir={out}') == 0
  assert list(dict.fromkeys(used)) == [(1, 0.9), (2.5, 0.9), (1, 1), (2.5, 1)]
  assert sorted(path.name for path in (out / 'points').iterdir()) == sorted(POINTS)
  content = json.loads((out / 'sweep.json').read_text())
  assert content['sweep'] == {'guidance_scale': [1, 2.5], 'top_p': [0.9, 1]}
  (curve,) = content['curves']
  assert [point['settings']['guidance_scale'] for point in curve['points']] == [1, 2.5] * 2
  for name, point in zip(POINTS, curve['points']):
    report = json.loads((out / 'points' / name / 'report.json').read_text())
    row = report['distributions'][0]['rows']['generated']
    assert report['sampling'] == point['settings'] and point['row'] == row
    assert row['pictures'] == PICTURES and row['alignment']['mean'] < 1
    one = measurement.read_all(str(out / 'points' / name / 'report.json'))['ranker']
    assert measurement.read_all(str(out / 'sweep.json'))[f'{name}/ranker'] == one
    assert one.values['frechet_distance'].value == row['frechet_distance']
    assert one.subject['sampling'] == point['settings']
  picture = Image.open(out / 'sweep.png')
  assert picture.width == 560 and picture.height == 400 + 2 * 17  # Two lines, named below.
  printed = capsys.readouterr().out
  assert (
    'point 4 of 4: guidance_scale=2.5,top_p=1' in printed and str(out / 'sweep.json') in printed
  )
  written = (out / 'sweep.md').read_text()
  assert '| guidance_scale | top_p | pictures |' in written
  assert '12 pictures are no more than the 192 features' in written


def test_a_stopped_sweep_resumes_within_a_point(pipeline, coco, tmp_path):
  out = tmp_path / 'out'
  with pipeline.stopped_after(3):
    run(*coco, *SWEEP, f'--output_dir={out}')
  assert (out / 'points' / POINTS[0] / 'report.json').exists()
  assert not (out / 'points' / POINTS[1] / 'report.json').exists()
  run(*coco, *SWEEP, f'--output_dir={out}')
  # Twelve captions in shards of eight and four, at four points, none of them twice.
  assert [len(group) for group in pipeline.generated] == [8, 4] * 4
  run(*coco, *SWEEP, f'--output_dir={tmp_path}/whole')
  assert (tmp_path / 'whole' / 'sweep.json').read_text() == (out / 'sweep.json').read_text()
  count = len(pipeline.generated)
  # More values join the finished points.
  run(*coco, '--sweep', 'guidance_scale=1,2.5,4', 'top_p=1', f'--output_dir={out}')
  assert len(pipeline.generated) == count + 2
  points = json.loads((out / 'sweep.json').read_text())['curves'][0]['points']
  assert [point['settings']['guidance_scale'] for point in points] == [1, 2.5, 4]
  with pytest.raises(UserError, match='another run, with seed 0, but this one has 1'):
    run(*coco, *SWEEP, '--seed=1', f'--output_dir={out}')
  with pytest.raises(UserError, match='another run, with sampling {}'):
    run(*coco, *SWEEP, '--temperature=0.5', f'--output_dir={out}')


def test_real_pictures_are_read_once(pipeline, coco, tmp_path, monkeypatch):
  made = []
  reconstruct = pipeline.reconstruct
  monkeypatch.setattr(pipeline, 'reconstruct', lambda images: made.append(1) or reconstruct(images))
  run(*coco, *SWEEP, f'--output_dir={tmp_path}/out')
  assert len(made) == 1


def test_tables_count_captions_that_are_left_out(pipeline, coco, tmp_path):
  (tmp_path / 'val2014' / '3.png').write_bytes(b'damaged')
  (tmp_path / 'val2014' / '4.png').unlink()
  run(*coco, '--sweep', 'guidance_scale=1,2', f'--output_dir={tmp_path}/out')
  run(*coco, '--num_images=2', '--rejection', '1', f'--output_dir={tmp_path}/accepted')
  skipped = 'Skipped: 1 caption (no picture file), 1 caption (unknown picture format).'
  assert skipped in (tmp_path / 'out' / 'sweep.md').read_text()
  assert skipped in (tmp_path / 'accepted' / 'rejection.md').read_text()


def test_points_with_other_real_pictures_are_not_joined(pipeline, coco, tmp_path):
  out = tmp_path / 'out'
  run(*coco, '--sweep', 'guidance_scale=1,2', f'--output_dir={out}')
  Image.fromarray(fakes.render('another')).save(tmp_path / 'val2014' / '3.png')
  with pytest.raises(UserError, match='guidance_scale=3/.* differ in real_digest. Delete'):
    run(*coco, '--sweep', 'guidance_scale=1,2,3', f'--output_dir={out}')
  for value in (1, 2):
    shutil.rmtree(out / 'points' / f'guidance_scale={value}')
  run(*coco, '--sweep', 'guidance_scale=1,2,3', f'--output_dir={out}')


def test_a_damaged_point(pipeline, coco, tmp_path):
  out = tmp_path / 'out'
  run(*coco, *SWEEP, f'--output_dir={out}')
  path = out / 'points' / POINTS[2] / 'report.json'
  for content in ('{}', '[', '{"dataset": "x", "distributions": [{"rows": {}}]}'):
    path.write_text(content)
    with pytest.raises(UserError, match='report.json is damaged; delete it'):
      run(*coco, *SWEEP, f'--output_dir={out}')
  path.unlink()
  run(*coco, *SWEEP, f'--output_dir={out}')


def test_splits_of_openmoji_are_curves(pipeline, tmp_path):
  out = tmp_path / 'out'
  flags = ['--splits', 'validation', 'unseen_combinations', '--num_images=2']
  run(*flags, '--sweep', 'guidance_scale=1,2', f'--output_dir={out}')
  content = json.loads((out / 'sweep.json').read_text())
  assert [curve['pictures'] for curve in content['curves']] == ['validation', 'unseen_combinations']
  assert [len(curve['points']) for curve in content['curves']] == [2, 2]
  assert Image.open(out / 'sweep.png').height == 2 * 400
  count = len(pipeline.generated)
  run(*flags, '--sweep', 'guidance_scale=1,2', f'--output_dir={out}')
  assert len(pipeline.generated) == count
  place = f'{out}/sweep.json#guidance_scale='
  names = f'{place}1/validation/ranker', f'{place}2/validation/ranker'
  text = measurement.compare(names).text()
  assert f'sampling.guidance_scale: 1.0 in {names[0]}, 2.0 in {names[1]}' in text
  with pytest.raises(UserError, match='differ in dataset'):
    measurement.compare((names[0], f'{place}1/unseen_combinations/ranker'))


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--sweep', 'guidance=1'], '--sweep guidance=1: expected SETTING=VALUE,VALUE'),
    (['--sweep', 'guidance_scale'], 'expected SETTING=VALUE,VALUE'),
    (['--sweep', 'guidance_scale=1,x'], "'x' is not a value of guidance_scale"),
    (['--sweep', 'guidance_scale=1,1.0'], '1.0 is given twice'),
    (['--sweep', 'top_k=1.5'], "'1.5' is not a value of top_k"),
    (['--sweep', 'top_p=1', 'top_p=2'], 'top_p is given twice'),
    (['--sweep', 'top_p=1,2'], 'top_p=2'),
    (['--sweep', 'top_p=1', '--top_p=0.5'], 'leave out --top_p'),
    (['--sweep', 'top_p=1', '--rejection', '1'], 'exclude each other'),
    (['--rejection', '0'], 'a share is above 0'),
    (['--rejection', '1.5'], 'a share is above 0, and at most 1'),
    (['--rejection', 'nan'], 'a share is above 0'),
    (['--rejection', '0.05', '--num_images=4'], 'draw --num_images=20'),
    (['--dataset=openmoji_scenes', '--rejection', '1'], 'not to openmoji_scenes'),
  ],
)
def test_bad_flags(pipeline, tmp_path, flags, message):
  with pytest.raises(UserError, match=message):
    run(*flags, f'--output_dir={tmp_path}/out')
  assert not (tmp_path / 'out').exists() and not pipeline.generated


def test_a_model_without_a_ranker(pipeline, tmp_path):
  pipeline.ranker = None
  for flags in (['--sweep', 'top_p=1'], ['--rejection', '1']):
    with pytest.raises(UserError, match='the model fake has no ranker'):
      run(*flags, f'--output_dir={tmp_path}/out')
  assert not (tmp_path / 'out').exists() and not pipeline.generated


# Rejection.


def test_rejection_keeps_the_best_and_compares_equal_numbers(pipeline, coco, tmp_path, capsys):
  out = tmp_path / 'out'
  flags = [*coco, '--num_images=20', '--rejection', '1', '0.05', '0.5', f'--output_dir={out}']
  run(*flags)
  content = json.loads((out / 'rejection.json').read_text())
  (table,) = content['tables']
  assert [share['share'] for share in table['shares']] == [0.05, 0.5, 1]
  assert [share['accepted'] for share in table['shares']] == [1, 10, 20]
  rows = [share['row'] for share in table['shares']]
  assert [row['pictures'] for row in rows] == [PICTURES] * 3 and content['compared'] == 1
  # Pictures of smaller indices fit better, so the ranker finds better ones the less it accepts.
  alignments = [row['alignment']['mean'] for row in rows]
  assert alignments[0] > alignments[1] > alignments[2]
  distances = [row['frechet_distance'] for row in rows]
  assert distances[0] < distances[1] < distances[2]
  # The smallest share has the best picture of each caption, computed here from the pictures.
  ranker = pipeline.ranker
  captions = [f'picture {identity}' for identity in range(PICTURES)]
  order = [text for group in pipeline.generated for text in group][::20]
  assert sorted(order) == sorted(captions)
  best = []
  for place, caption in enumerate(order):
    images = np.stack([pattern(caption, 20 * place + index) for index in range(20)])
    best.append(images[ranker.scores([caption] * 20, images).argmax()])
  real = np.stack([fakes.render(caption) for caption in captions])
  expected = frechet.frechet_distance(
    ranker.image_features(np.stack(best)), ranker.image_features(real)
  )
  assert distances[0] == pytest.approx(expected, abs=1e-6)
  assert Image.open(out / 'rejection.png').size == (560, 400)
  measured = measurement.read_all(str(out / 'rejection.json'))
  assert list(measured) == [f'share={share}/ranker' for share in ('0.05', '0.5', '1')]
  for found, row, share in zip(measured.values(), rows, (0.05, 0.5, 1)):
    assert found.values['frechet_distance'].value == row['frechet_distance']
    assert found.subject['share'] == share
  paths = [f'{out}/rejection.json#{name}' for name in ('share=0.05/ranker', 'share=1/ranker')]
  assert 'accepted: 1 in ' in measurement.compare((paths[0], paths[1])).text()
  count = len(pipeline.generated)
  run(*flags)
  assert len(pipeline.generated) == count
  assert json.loads((out / 'rejection.json').read_text()) == content
  # Other shares of the same pictures need no new ones.
  run(*flags[:-2], '0.25', flags[-1])
  assert len(pipeline.generated) == count
  with pytest.raises(UserError, match='another run, with num_images 20, but this one has 10'):
    run(*coco, '--num_images=10', '--rejection', '1', f'--output_dir={out}')
  assert '12 pictures are no more than the 192 features' in (out / 'rejection.md').read_text()
  assert re.search(r'\n0\.05 +1 +12 ', capsys.readouterr().out)


def test_rejection_on_openmoji(pipeline, tmp_path):
  out = tmp_path / 'out'
  run('--splits', 'unseen_combinations', '--rejection', '1', '0.25', f'--output_dir={out}')
  content = json.loads((out / 'rejection.json').read_text())
  assert content['num_images'] == 4 and content['tables'][0]['pictures'].endswith(
    'unseen_combinations'
  )
  assert [share['accepted'] for share in content['tables'][0]['shares']] == [1, 4]


def test_rejection_of_a_single_prompt_has_no_distance(pipeline, tmp_path):
  flags = ['--splits=validation', '--max_prompts=1', '--num_images=2', '--rejection', '0.5', '1']
  assert run(*flags, f'--output_dir={tmp_path}/out') == 0
  (table,) = json.loads((tmp_path / 'out' / 'rejection.json').read_text())['tables']
  assert [share['row']['frechet_distance'] for share in table['shares']] == [None, None]
  assert not (tmp_path / 'out' / 'rejection.png').exists()


def test_choice_among_the_accepted():
  scores = np.random.default_rng(0).random((50, 8), np.float32)
  best = np.argsort(-scores, axis=1)
  for accepted, compared in ((1, 1), (4, 2), (8, 8)):
    chosen = rejection.choose(scores, accepted, compared, seed=0)
    assert (chosen.sum(axis=1) == compared).all()
    for row, order in zip(chosen, best):
      assert set(np.flatnonzero(row)) <= set(order[:accepted])
  # All of the accepted are chosen sometimes.
  chosen = rejection.choose(scores, 4, 1, seed=0)
  places = [
    int(np.flatnonzero(order == np.flatnonzero(row)[0])[0]) for row, order in zip(chosen, best)
  ]
  assert set(places) == {0, 1, 2, 3}
  assert rejection.accepted_count(0.05, 20) == 1 and rejection.accepted_count(0.5, 5) == 2


# Charts.


@pytest.mark.parametrize(
  'low, high', [(0, 1), (0.884, 0.935), (-3, 7), (5, 5), (0, 0), (1e-7, 3e-7), (12.3, 45_678)]
)
def test_ticks_are_round_and_cover(low, high):
  found = line_chart.ticks(low, high)
  steps = np.diff(found)
  assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
  np.testing.assert_allclose(steps, steps[0])
  digit = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
  assert min(abs(digit - round_one) for round_one in (1, 2, 5)) < 1e-6


def test_points_are_drawn_where_they_belong():
  line = [line_chart.Point(0, 0, 'a'), line_chart.Point(5, 10, 'b', x_error=1.0)]
  page = line_chart.draw([line_chart.Panel('title', 'x', 'y', {'': line})])
  pixels = np.asarray(page)
  blue = (pixels == [0, 0x72, 0xB2]).all(-1)
  rows, columns = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
  # The first point is in the lower left corner, and the second at the top.
  assert blue[344, 84] and abs(rows.max() - 347) <= 2 and abs(columns.min() - 81) <= 2
  assert blue[64].any()
