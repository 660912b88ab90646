"""Tests of `parti-jax evaluate --dataset=coco --reference`, also in sweeps and with rejection."""

import argparse
import json
import shutil

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import evaluate
from parti_jax.cli import evaluate_samples
from parti_jax.core.errors import UserError
from parti_jax.evaluation import measurement
from parti_jax.evaluation.datasets import coco
from parti_jax.evaluation.datasets import localized_narratives
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.metrics import frechet

CAPTIONS = 12


def draw(caption, index):
  return np.random.default_rng([*caption.encode(), index]).integers(
    0, 256, (fakes.SIZE, fakes.SIZE, 3), dtype=np.uint8
  )


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  """A pipeline whose pictures depend on the guidance, and Inception of three features."""

  def faded(caption, index):
    return (draw(caption, index) / pipeline.settings.get('guidance_scale', 1)).astype(np.uint8)

  pipeline = fakes.FakePipeline(faded, fakes.FakeRanker(draw))
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None, weights='float': pipeline
  )
  monkeypatch.setattr(picture_shards, 'SHARD', 8)
  monkeypatch.setattr(features, 'Inception', fakes.FakeInception)
  return pipeline


def annotations(path, captions):
  content = {'images': [], 'annotations': []}
  for identity, caption in enumerate(captions):
    content['images'].append({'id': identity, 'file_name': f'{identity}.png'})
    content['annotations'].append({'image_id': identity, 'caption': caption})
  path.write_text(json.dumps(content))
  return f'--annotations={path}'


@pytest.fixture(name='flags')
def fixture_flags(tmp_path):
  """Captions, of which two can't be used, and statistics; no pictures."""
  captions = [f'picture {identity}' for identity in range(CAPTIONS)]
  statistics = tmp_path / 'statistics.npz'
  np.savez(statistics, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2))
  return [
    '--dataset=coco',
    annotations(tmp_path / 'captions.json', [*captions, ' ', None]),
    f'--reference={statistics}',
    f'--inception_weights={__file__}',
    '--image_size=16',
  ]


def run(*arguments):
  parser = argparse.ArgumentParser()
  evaluate.add_arguments(parser)
  return evaluate.run(parser.parse_args(arguments))


def test_a_sweep_against_statistics_resumes(pipeline, flags, tmp_path, capsys):
  out = tmp_path / 'out'
  command = [*flags, f'--output_dir={out}']
  with pipeline.stopped_after(3):
    run(*command, '--sweep', 'guidance_scale=1,2')
  assert not (out / 'sweep.json').exists()
  run(*command, '--sweep', 'guidance_scale=1,2')
  assert [len(group) for group in pipeline.generated] == [8, 4] * 2
  run(*flags, '--sweep', 'guidance_scale=1,2', f'--output_dir={tmp_path}/whole')
  whole = json.loads((tmp_path / 'whole' / 'sweep.json').read_text())
  content = json.loads((out / 'sweep.json').read_text())
  assert content['curves'] == whole['curves']
  (curve,) = content['curves']
  assert curve['pictures'] == f'MS-COCO against {tmp_path}/statistics.npz'
  measured = measurement.read_all(str(out / 'sweep.json'))
  assert list(measured) == [
    f'guidance_scale={scale}/{name}' for scale in (1, 2) for name in ('reference', 'ranker')
  ]
  for scale, point in zip((1, 2), curve['points']):
    place = out / 'points' / f'guidance_scale={scale}'
    found = measured[f'guidance_scale={scale}/reference']
    assert found == measurement.read(str(place / 'measurement.json'))
    assert set(found.values) == {'fid', 'sfid', 'inception_score'}
    assert found.values['fid'].value == point['row']['frechet_distance']
    assert found.values['fid'].error == point['row']['frechet_error'] > 0
    assert point['row']['pictures'] == CAPTIONS and point['row']['real'] is None
    assert found.subject['sampling'] == {'guidance_scale': scale}
    assert found.protocol['captions'] == CAPTIONS and found.protocol['dataset'] == 'MS-COCO'
    assert found.protocol['picture_size'] == [16, 16]
    assert found.protocol['resize'] == picture_sets.RESIZE_FILTER
    report = json.loads((place / 'report.json').read_text())
    assert report['captions'] == CAPTIONS and report['pictures'] is None
    (table,) = report['distributions']
    assert list(table['rows']) == ['generated']
    assert table['rows']['generated']['alignment'] == point['row']['alignment']
    # The distance is that of the pictures in the shards.
    captions = json.loads((tmp_path / 'captions.json').read_text())['annotations']
    shards = picture_shards.PictureShards(
      place / 'generated', [one['caption'] for one in captions[:CAPTIONS]]
    )
    images = features.resized(np.concatenate(list(shards.batches())), 16)
    values = fakes.FakeInception(__file__, None, True, 'tensorflow1')(images).values
    expected = frechet.distance(
      frechet.Gaussian.of(values.astype(np.float64)), frechet.Gaussian(np.zeros(3), np.eye(3))
    )
    assert found.values['fid'].value == pytest.approx(expected, rel=1e-6)
  fids = [measured[f'guidance_scale={scale}/reference'].values['fid'].value for scale in (1, 2)]
  assert fids[0] != fids[1]
  assert Image.open(out / 'sweep.png').size == (560, 400)
  for text in (capsys.readouterr().out, (out / 'sweep.md').read_text()):
    assert 'Skipped: 2 captions (no caption).' in text
  # More values join the finished points.
  count = len(pipeline.generated)
  run(*command, '--sweep', 'guidance_scale=1,2,3')
  assert len(pipeline.generated) == count + 2


def test_points_by_unlike_protocols_are_not_joined(pipeline, flags, tmp_path):
  out = tmp_path / 'out'
  command = [*flags, f'--output_dir={out}', '--sweep', 'guidance_scale=1,2']
  run(*command)
  count = len(pipeline.generated)
  np.savez(tmp_path / 'other.npz', mu=np.ones(3), sigma=np.eye(3))
  annotations(tmp_path / 'fewer.json', ['another caption'] * 3)
  for flag, difference in (
    (f'--reference={tmp_path}/other.npz', 'reference'),
    (f'--annotations={tmp_path}/fewer.json', 'captions'),
    ('--image_size=24', 'image_size'),
    ('--seed=1', 'seed'),
    ('--num_captions=5', 'num_captions'),
  ):
    with pytest.raises(UserError, match=f'another run, with {difference} '):
      run(*command, flag)
  # A point that another command replaced.
  point = out / 'points' / 'guidance_scale=2'
  shutil.rmtree(point)
  run(*flags, '--guidance_scale=2', '--image_size=24', f'--output_dir={point}')
  with pytest.raises(UserError, match='guidance_scale=2/.* same protocol.* picture_size'):
    run(*command)
  report = point / 'report.json'
  content = json.loads(report.read_text())
  del content['measurements']['reference']
  for damaged in (json.dumps(content), report.read_text()[:-50]):
    report.write_text(damaged)
    with pytest.raises(UserError, match='report.json is damaged; delete it'):
      run(*command)
  assert len(pipeline.generated) == count + 2


def test_one_setting_has_the_numbers_of_the_other_command(pipeline, flags, tmp_path):
  """Against a folder of pictures of another size, over a ranker's features."""
  place = tmp_path / 'real'
  place.mkdir()
  for index in range(6):
    Image.fromarray(draw('real', index)).resize((32, 24)).save(place / f'{index}.png')
  (place / '9.png').write_bytes(b'no picture')
  out = tmp_path / 'out'
  run(*flags[:2], f'--reference={place}', f'--output_dir={out}')
  found = measurement.read(str(out / 'measurement.json'))
  assert f'{place}: left out 1 unknown picture format.' in found.remarks
  assert found.protocol['reference']['pictures'] == 6
  samples = tmp_path / 'samples'
  samples.mkdir()
  captions = [caption for group in pipeline.generated for caption in group]
  for index, caption in enumerate(captions):
    Image.fromarray(draw(caption, index)).save(samples / f'{index:02d}.png')
  parser = argparse.ArgumentParser()
  evaluate_samples.add_arguments(parser)
  command = [str(samples), f'--reference={place}', f'--image_size={fakes.SIZE}']
  evaluate_samples.run(parser.parse_args([*command, f'--output_dir={tmp_path}/alone']))
  alone = measurement.read(str(tmp_path / 'alone' / 'measurement.json'))
  assert alone.values == found.values
  # The captions are part of the protocol besides.
  named = measurement.differences(alone.protocol, found.protocol)
  assert set(named) == {'dataset', 'captions', 'digest', 'compression'} - (
    {'compression'} if alone.protocol['compression'] == found.protocol['compression'] else set()
  )
  assert Image.open(out / 'contact_sheet.png').width > 4 * 128
  content = (out / 'report.json').read_bytes()
  run(*flags[:2], f'--reference={place}', f'--output_dir={out}')  # Draws nothing more.
  assert len(pipeline.generated) == 2 and (out / 'report.json').read_bytes() == content


def test_without_a_ranker_there_is_no_alignment(pipeline, flags, tmp_path):
  pipeline.ranker = None
  run(*flags, '--sweep', 'top_p=0.5,1', f'--output_dir={tmp_path}/out')
  (curve,) = json.loads((tmp_path / 'out' / 'sweep.json').read_text())['curves']
  assert [point['row']['alignment'] for point in curve['points']] == [None, None]
  with pytest.raises(UserError, match='the model fake has no ranker; give --inception_weights'):
    run(*flags[:3], '--sweep', 'top_p=0.5,1', f'--output_dir={tmp_path}/none')
  assert not (tmp_path / 'none').exists()


def test_rejection_against_statistics(pipeline, flags, tmp_path):
  def noisy(caption, index):
    weight = index % 4 / 4
    return ((1 - weight) * draw(caption, 0) + weight * draw('noise', index)).astype(np.uint8)

  pipeline.draw = noisy
  out = tmp_path / 'out'
  command = [*flags, '--num_images=4', '--rejection', '1', '0.25', f'--output_dir={out}']
  run(*command)
  (table,) = json.loads((out / 'rejection.json').read_text())['tables']
  rows = [share['row'] for share in table['shares']]
  assert [row['pictures'] for row in rows] == [CAPTIONS] * 2
  assert rows[0]['alignment']['mean'] > rows[1]['alignment']['mean']
  measured = measurement.read_all(str(out / 'rejection.json'))
  assert list(measured) == ['share=0.25/reference', 'share=1/reference']
  assert measured['share=1/reference'].protocol['captions'] == CAPTIONS
  assert 'Skipped: 2 captions (no caption).' in (out / 'rejection.md').read_text()
  count, content = len(pipeline.generated), (out / 'rejection.json').read_bytes()
  run(*command)
  assert len(pipeline.generated) == count
  assert (out / 'rejection.json').read_bytes() == content


@pytest.mark.parametrize(
  'arrays, message',
  [
    ({'mu': np.zeros(4), 'sigma': np.eye(4)}, 'statistics of 4 features'),
    ({'mu': np.zeros(3)}, '--reference: .*reference.npz has only one of mu and sigma'),
    ({'mean': np.zeros(3)}, 'has no array arr_0 of pictures, but mean'),
    (
      {'arr_0': np.zeros((9, 8, 8, 3), np.uint8)},
      '8×8 pixels, but .* 16×16; give --image_size, or',
    ),
  ],
)
def test_references_that_do_not_fit(pipeline, flags, tmp_path, arrays, message):
  reference = tmp_path / 'reference.npz'
  np.savez(reference, **arrays)
  with pytest.raises(UserError, match=message):
    run(
      *flags, f'--reference={reference}', '--sweep', 'top_p=0.5,1', f'--output_dir={tmp_path}/out'
    )
  assert not pipeline.generated and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'contents, message',
  [
    ([b'no picture'] * 2, 'has no usable picture .2 unknown picture format'),
    ([b'no picture', None], 'has one usable picture; a distance needs at least two'),
  ],
)
def test_a_reference_without_pictures_is_found_first(pipeline, flags, tmp_path, contents, message):
  place = tmp_path / 'real'
  place.mkdir()
  for index, content in enumerate(contents):
    if content is None:
      Image.fromarray(draw('real', index)).save(place / f'{index}.png')
    else:
      (place / f'{index}.png').write_bytes(content)
  with pytest.raises(UserError, match=message):
    run(
      *flags[:2], f'--reference={place}', '--sweep', 'top_p=0.5,1', f'--output_dir={tmp_path}/out'
    )
  assert not pipeline.generated


def test_one_picture_is_too_few(pipeline, flags, tmp_path):
  command = [*flags, '--num_captions=1', f'--output_dir={tmp_path}/out']
  for more in ([], ['--sweep', 'top_p=0.5,1'], ['--rejection', '0.5', '1', '--num_images=2']):
    with pytest.raises(UserError, match='MS-COCO: one caption leads to one picture .* two'):
      run(*command, *more)
  assert not pipeline.generated and not (tmp_path / 'out').exists()
  run(*command, '--rejection', '1', '--num_images=2')


def test_the_same_captions_are_chosen_without_pictures(tmp_path):
  captions = [f'picture {identity // 3}, {identity % 3}' for identity in range(30)]
  content = {'images': [], 'annotations': []}
  lines = []
  for identity in range(10):
    content['images'].append({'id': identity, 'file_name': f'{identity}.png'})
    Image.new('RGB', (8, 8)).save(tmp_path / f'{identity}.png')
  for index, caption in enumerate(captions):
    content['annotations'].append({'image_id': index // 3, 'caption': caption})
    lines.append(json.dumps({'image_id': str(index // 3), 'caption': caption}) + '\n')
  (tmp_path / 'captions.json').write_text(json.dumps(content))
  (tmp_path / 'narratives.jsonl').write_text(''.join(lines))
  for reader, name in ((coco, 'captions.json'), (localized_narratives, 'narratives.jsonl')):
    path = str(tmp_path / name)
    chosen = [reader.read(path, folder, 12, 3) for folder in (str(tmp_path), None)]
    assert chosen[0].captions == chosen[1].captions
    assert chosen[0].picture_of.tolist() == chosen[1].picture_of.tolist()
    assert len(chosen[0].pictures) == 10 and len(chosen[1].pictures) == 0
