"""Tests of `parti-jax evaluate --dataset=imagenet`."""

import argparse
import collections
import json
import shutil
import types
import zipfile

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import evaluate
from parti_jax.cli import evaluate_samples
from parti_jax.core.errors import UserError
from parti_jax.evaluation import measurement
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.datasets import sample_files
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.metrics import frechet

NAMES = ['tench', 'goldfish', 'great white shark']


def draw(caption, index):
  """Returns a picture that only depends on its class and index."""
  return np.random.default_rng([*caption.encode(), index]).integers(
    0, 256, (fakes.SIZE, fakes.SIZE, 3), dtype=np.uint8
  )


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  pipeline = fakes.FakePipeline(draw)
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None, weights='float': pipeline
  )
  monkeypatch.setattr(picture_shards, 'SHARD', 4)
  return pipeline


@pytest.fixture(name='flags')
def fixture_flags(tmp_path):
  path = tmp_path / 'classes.txt'
  path.write_text('\n'.join(NAMES) + '\n')
  return ['--dataset=imagenet', f'--classes={path}', '--per_class=5']


def run(*arguments):
  parser = argparse.ArgumentParser()
  evaluate.add_arguments(parser)
  return evaluate.run(parser.parse_args(arguments))


def test_samples_are_balanced_and_read_by_numpy(pipeline, flags, tmp_path):
  assert run(*flags, '--guidance_scale=2', f'--output_dir={tmp_path}/out') == 0
  with np.load(tmp_path / 'out' / 'samples.npz') as found:
    images, labels = found['arr_0'], found['arr_1']
  assert images.dtype == np.uint8 and images.shape == (15, fakes.SIZE, fakes.SIZE, 3)
  assert labels.tolist() == [0, 1, 2] * 5
  for index, (image, label) in enumerate(zip(images, labels)):
    np.testing.assert_array_equal(image, draw(NAMES[label], index))  # Each has its own noise.
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['samples'] == 15 and report['sampling'] == {'guidance_scale': 2.0}
  assert report['recognized'] is None and report['resize'] is None
  assert Image.open(tmp_path / 'out' / 'contact_sheet.png').width > 3 * 128
  # ADM's evaluator reads the header of the first member itself, and then rows of it.
  with zipfile.ZipFile(tmp_path / 'out' / 'samples.npz') as archive:
    assert archive.namelist() == ['arr_0.npy', 'arr_1.npy']
    assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    with archive.open('arr_0.npy') as file:
      assert np.lib.format.read_magic(file) == (1, 0)
      shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
      assert (shape, fortran, dtype) == ((15, fakes.SIZE, fakes.SIZE, 3), False, np.uint8)
      assert file.read(images[0].nbytes) == images[0].tobytes()


def test_a_stopped_run_resumes_to_the_same_file(pipeline, flags, tmp_path):
  with pipeline.stopped_after(2):
    run(*flags, f'--output_dir={tmp_path}/out')
  assert not (tmp_path / 'out' / 'samples.npz').exists()
  run(*flags, f'--output_dir={tmp_path}/out')
  drawn = [caption for group in pipeline.generated for caption in group]
  assert collections.Counter(drawn) == dict.fromkeys(NAMES, 5)
  run(*flags, f'--output_dir={tmp_path}/whole')
  files = [tmp_path / folder / 'samples.npz' for folder in ('out', 'whole')]
  assert files[0].read_bytes() == files[1].read_bytes()
  reports = [json.loads((file.parent / 'report.json').read_text()) for file in files]
  assert reports[0] == reports[1] and len(reports[0]['sha256']) == 64
  for flag, message in (
    ('--seed=1', 'with seed 0'),
    ('--per_class=6', 'with per_class 5'),
    ('--template=a {}', 'with classes'),
    ('--sample_size=4', 'with sample_size None'),
  ):
    with pytest.raises(UserError, match=f'pictures of another run, {message}'):
      run(*flags, flag, f'--output_dir={tmp_path}/out')


def test_png_files_and_another_size(pipeline, flags, tmp_path):
  out = tmp_path / 'out'
  run(*flags, '--samples', 'png', 'npz', '--sample_size=4', f'--output_dir={out}')
  names = [f'{index:06d}.png' for index in range(15)]
  assert sorted(path.name for path in (out / 'samples').iterdir()) == names
  with np.load(out / 'samples.npz') as found:
    images = found['arr_0']
  assert images.shape == (15, 4, 4, 3)
  for name, image in zip(names, images):
    np.testing.assert_array_equal(np.asarray(Image.open(out / 'samples' / name)), image)
  expected = Image.fromarray(draw('goldfish', 1)).resize((4, 4), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(images[1], np.asarray(expected))
  report = json.loads((out / 'report.json').read_text())
  assert report['sample_size'] == 4 and report['resize'].startswith('bicubic')
  (out / 'samples' / names[3]).unlink()
  run(*flags, '--samples', 'png', 'npz', '--sample_size=4', f'--output_dir={out}')
  assert (out / 'samples' / names[3]).exists()


def test_ids_and_templates_as_texts(pipeline, flags, tmp_path):
  run(*flags, '--label=id', f'--output_dir={tmp_path}/ids')
  assert set(pipeline.generated[0]) == {'0', '1', '2'}
  pipeline.generated.clear()
  pipeline.ranker = fakes.FakeRanker(draw)  # Reads the names, even where the model reads numbers.
  run(*flags, '--label=id', f'--output_dir={tmp_path}/ranked')
  found = json.loads((tmp_path / 'ranked' / 'report.json').read_text())['recognized']
  expected = [draw(str(index % 3), index) for index in range(15)]
  names = pipeline.ranker.text_features(NAMES)
  cosines = [
    pipeline.ranker.image_features(image[None])[0] @ names[index % 3]
    for index, image in enumerate(expected)
  ]
  assert found['alignment']['mean'] == pytest.approx(np.mean(cosines), abs=1e-6)
  pipeline.generated.clear()
  run(*flags, '--template=a photo of a {}', f'--output_dir={tmp_path}/texts')
  assert pipeline.generated[0][0] == 'a photo of a tench'


def test_what_a_ranker_recognizes(pipeline, flags, tmp_path):
  """Pictures of two classes are right, and those of the third show the first."""

  def shown(caption, index):
    del index
    return draw('tench' if caption == 'goldfish' else caption, 0)

  pipeline.draw = shown
  pipeline.ranker = fakes.FakeRanker(draw)
  run(*flags, f'--output_dir={tmp_path}/out')
  found = json.loads((tmp_path / 'out' / 'report.json').read_text())['recognized']
  assert found['top1']['mean'] == pytest.approx(2 / 3) and found['top5']['mean'] == 1
  # Over classes, of which two are always right and one never.
  assert found['top1']['error'] == pytest.approx(np.std([1, 1, 0], ddof=1) / 3**0.5)
  unit = pipeline.ranker.text_features(NAMES)
  expected = np.mean([1, unit[0] @ unit[1], 1])
  assert found['alignment']['mean'] == pytest.approx(expected, abs=1e-6)
  measured = measurement.read_all(str(tmp_path / 'out' / 'report.json'))['ranker']
  assert measured.values['class_top1'].value == found['top1']['mean']
  assert measured.protocol['per_class'] == 5 and measured.subject['label'] == 'name'
  assert '| 3 | 15 |' in (tmp_path / 'out' / 'report.md').read_text()


def test_the_best_of_several_by_the_ranker(pipeline, flags, tmp_path):
  pipeline.ranker = fakes.FakeRanker(draw)
  run(*flags, '--num_images=4', f'--output_dir={tmp_path}/out')
  with np.load(tmp_path / 'out' / 'samples.npz') as found:
    # The fake ranker prefers the last of each four.
    np.testing.assert_array_equal(found['arr_0'][2], draw('great white shark', 2 * 4 + 3))
  assert 'acceptance rate of 0.25' in (tmp_path / 'out' / 'report.md').read_text()


@pytest.mark.parametrize(
  'flags_given, message',
  [
    (['--dataset=imagenet'], 'needs --classes FILE'),
    (['--classes=x'], '--classes only applies to --dataset=imagenet'),
    (['--dataset=imagenet', '--classes=nothing.txt'], 'nothing.txt cannot be read'),
    (['--dataset=imagenet', '--per_class=0'], '--per_class must be a positive number'),
    (['--dataset=imagenet', '--sample_size=0'], '--sample_size'),
    (['--dataset=imagenet', '--sweep', 'top_p=1'], 'needs --reference PATH'),
    (['--dataset=imagenet', '--rejection', '1'], 'needs --reference PATH'),
    (['--reference=x'], '--dataset=coco, localized_narratives and imagenet, not to openmoji'),
  ],
)
def test_bad_flags(pipeline, tmp_path, flags_given, message):
  with pytest.raises(UserError, match=message):
    run(*flags_given, f'--output_dir={tmp_path}/out')
  assert not (tmp_path / 'out').exists() and not pipeline.generated


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--label=number', "label='number' is unknown"),
    ('--template=photo', 'must have {} once'),
    ('--samples=tar', "unknown form 'tar'; choose from npz, png"),
    ('--sample_size=100000', '--sample_size=100000 must be a whole number from 1 to 4096'),
  ],
)
def test_bad_values(pipeline, flags, tmp_path, flag, message):
  with pytest.raises(UserError, match=message):
    run(*flags, flag, f'--output_dir={tmp_path}/out')
  assert not (tmp_path / 'out').exists() and not pipeline.generated


def test_a_model_of_numbered_classes(pipeline, flags, tmp_path, monkeypatch):
  monkeypatch.setattr(pipeline, 'config', types.SimpleNamespace(classes=2))
  with pytest.raises(UserError, match='the model fake draws classes by their numbers'):
    run(*flags, f'--output_dir={tmp_path}/out')
  with pytest.raises(UserError, match='has 3 classes, but the model fake knows 2'):
    run(*flags, '--label=id', f'--output_dir={tmp_path}/out')
  assert not (tmp_path / 'out').exists() and not pipeline.generated


def test_a_disk_that_is_too_small(pipeline, flags, tmp_path, monkeypatch):
  usage = collections.namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**9, 10**9, 1000))
  with pytest.raises(UserError, match='the samples take 0.0 GB, but the disk has 0.0 GB'):
    run(*flags, f'--output_dir={tmp_path}/out')
  assert not pipeline.generated


def test_an_npz_that_cannot_be_whole_leaves_nothing(tmp_path):
  batches = [np.zeros((2, 4, 4, 3), np.uint8)]
  with pytest.raises(ValueError, match='2 samples of 3 classes'):
    sample_files.write_npz(tmp_path / 'x.npz', batches, np.arange(3), 4)
  with pytest.raises(ValueError, match='expected'):
    sample_files.write_npz(tmp_path / 'x.npz', batches, np.arange(2), 5)
  assert list(tmp_path.iterdir()) == []
  size = sample_files.npz_bytes(2, 4)
  sample_files.write_npz(tmp_path / 'x.npz', batches, np.arange(2), 4)
  assert 0 <= size - (tmp_path / 'x.npz').stat().st_size < 1024


def _reference(path, seed=0, size=fakes.SIZE, **arrays):
  images = np.random.default_rng(seed).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
  np.savez(path, arr_0=images, **arrays)
  return f'--reference={path}'


def test_samples_are_compared_with_a_reference(pipeline, flags, tmp_path, capsys):
  pipeline.ranker = fakes.FakeRanker(draw)
  reference = _reference(tmp_path / 'real.npz')
  out = tmp_path / 'out'
  run(*flags, reference, f'--output_dir={out}')
  assert "Fréchet distance of the ranker's features" in capsys.readouterr().out
  found = measurement.read(str(out / 'measurement.json'))
  assert measurement.read_all(str(out / 'report.json'))['reference'] == found
  assert found.protocol['pictures'] == 15 and found.protocol['reference']['pictures'] == 20
  assert found.subject['drawn_with']['per_class'] == 5
  # Exactly the numbers and the protocol of the other command.
  parser = argparse.ArgumentParser()
  evaluate_samples.add_arguments(parser)
  command = [f'{out}/samples.npz', reference, f'--output_dir={tmp_path}/alone']
  evaluate_samples.run(parser.parse_args(command))
  alone = measurement.read(str(tmp_path / 'alone' / 'measurement.json'))
  assert (alone.values, alone.protocol) == (found.values, found.protocol)
  # The same pictures as PNG files, without drawing any.
  count = len(pipeline.generated)
  run(*flags, reference, '--samples=png', f'--output_dir={out}')
  again = measurement.read(str(out / 'measurement.json'))
  assert again.values == found.values and len(pipeline.generated) == count
  # Another reference is compared with the same pictures.
  run(*flags, _reference(tmp_path / 'real.npz', seed=1), f'--output_dir={out}')
  other = measurement.read(str(out / 'measurement.json'))
  assert other.values != found.values and len(pipeline.generated) == count
  run(*flags, _reference(tmp_path / 'real.npz'), f'--output_dir={out}')
  assert measurement.read(str(out / 'measurement.json')) == found


def test_a_sweep_of_class_samples_resumes(pipeline, flags, tmp_path):
  pipeline.ranker = fakes.FakeRanker(draw)

  def faded(caption, index):
    scale = pipeline.settings['guidance_scale']
    return (draw(caption, index) / scale).astype(np.uint8)

  pipeline.draw = faded
  command = [*flags, _reference(tmp_path / 'real.npz'), f'--output_dir={tmp_path}/out']
  with pipeline.stopped_after(6):
    run(*command, '--sweep', 'guidance_scale=1,2')
  run(*command, '--sweep', 'guidance_scale=1,2')
  assert [len(group) for group in pipeline.generated] == [4, 4, 4, 3] * 2
  out = tmp_path / 'out'
  (curve,) = json.loads((out / 'sweep.json').read_text())['curves']
  distances = [point['row']['frechet_distance'] for point in curve['points']]
  measured = measurement.read_all(str(out / 'sweep.json'))
  assert list(measured) == [
    f'guidance_scale={scale}/{name}' for scale in (1, 2) for name in ('reference', 'ranker')
  ]
  for scale, distance in zip((1, 2), distances):
    found = measured[f'guidance_scale={scale}/reference']
    point = out / 'points' / f'guidance_scale={scale}'
    assert found == measurement.read(str(point / 'measurement.json'))
    assert found.values['frechet_distance'].value == distance
    assert found.subject['drawn_with']['sampling'] == {'guidance_scale': scale}
  assert distances[0] != distances[1]
  assert [point['row']['pictures'] for point in curve['points']] == [15, 15]
  assert curve['points'][0]['row']['alignment']['mean'] < 1
  assert Image.open(out / 'sweep.png').size == (560, 400)
  assert 'no more pictures (15) than the 192 features' in (out / 'sweep.md').read_text()
  count = len(pipeline.generated)
  run(*command, '--sweep', 'guidance_scale=1,2,3')
  assert len(pipeline.generated) == count + 4
  with pytest.raises(UserError, match='another run, with per_class 5, but this one has 6'):
    run(*command, '--per_class=6', '--sweep', 'guidance_scale=1,2')
  _reference(tmp_path / 'real.npz', seed=1)
  with pytest.raises(UserError, match='another run, with reference'):
    run(*command, '--sweep', 'guidance_scale=1,2')


def test_references_that_do_not_fit(pipeline, flags, tmp_path):
  out = f'--output_dir={tmp_path}/out'
  sweep = ['--sweep', 'guidance_scale=1,2']
  with pytest.raises(UserError, match='the model fake has no ranker; give --inception_weights'):
    run(*flags, _reference(tmp_path / 'real.npz'), *sweep, out)
  pipeline.ranker = fakes.FakeRanker(draw)
  with pytest.raises(UserError, match='pictures of 6×6 pixels, but the samples have 8×8; give'):
    run(*flags, _reference(tmp_path / 'small.npz', size=6), *sweep, out)
  with pytest.raises(UserError, match='nowhere.npz'):
    run(*flags, f'--reference={tmp_path}/nowhere.npz', *sweep, out)
  with pytest.raises(UserError, match='--inception_weights needs --reference PATH'):
    run(*flags, f'--inception_weights={__file__}', out)
  assert not (tmp_path / 'out').exists() and not pipeline.generated


def test_a_sweep_against_statistics_over_inceptions_features(
  pipeline, flags, tmp_path, monkeypatch
):
  monkeypatch.setattr(features, 'Inception', fakes.FakeInception)
  reference = tmp_path / 'statistics.npz'
  np.savez(reference, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2))
  out = tmp_path / 'out'
  run(
    *flags,
    f'--reference={reference}',
    f'--inception_weights={__file__}',
    '--sweep',
    'top_p=0.5,1',
    f'--output_dir={out}',
  )
  (curve,) = json.loads((out / 'sweep.json').read_text())['curves']
  for value, point in zip(('0.5', '1'), curve['points']):
    found = measurement.read_all(str(out / 'sweep.json'))[f'top_p={value}/reference']
    assert set(found.values) == {'fid', 'sfid', 'inception_score'}
    assert point['row']['frechet_distance'] == found.values['fid'].value
    assert point['row']['frechet_error'] == found.values['fid'].error > 0
    assert point['row']['alignment'] is None and point['row']['real'] is None
  # Without a ranker the first setting is the axis.
  assert Image.open(out / 'sweep.png').size == (560, 400)


def test_rejection_of_class_samples(pipeline, flags, tmp_path, monkeypatch):
  """A ranker that reads the names accepts the best; the model reads numbers."""
  monkeypatch.setattr(picture_sets, 'BLOCK', 4)

  def noisy(caption, index):
    weight = index % 4 / 4
    mixed = (1 - weight) * draw(NAMES[int(caption)], 0) + weight * draw('noise', index)
    return mixed.astype(np.uint8)

  pipeline.draw, pipeline.ranker = noisy, fakes.FakeRanker(draw)
  out = tmp_path / 'out'
  command = [*flags, '--label=id', '--num_images=4', _reference(tmp_path / 'real.npz')]
  command += [f'--output_dir={out}', '--rejection', '1', '0.25']
  run(*command)
  (table,) = json.loads((out / 'rejection.json').read_text())['tables']
  assert [(share['share'], share['accepted']) for share in table['shares']] == [(0.25, 1), (1, 4)]
  rows = [share['row'] for share in table['shares']]
  # One of each four at both shares, which fits better where it was chosen.
  assert [row['pictures'] for row in rows] == [15, 15]
  best = np.stack([noisy(str(asked % 3), 4 * asked) for asked in range(15)])
  ranker = pipeline.ranker
  with np.load(tmp_path / 'real.npz') as file:
    real = ranker.image_features(file['arr_0'])
  expected = frechet.frechet_distance(ranker.image_features(best), real)
  assert rows[0]['frechet_distance'] == pytest.approx(expected, abs=1e-5)
  cosines = (ranker.image_features(best) * ranker.text_features(NAMES * 5)).sum(axis=1)
  assert rows[0]['alignment']['mean'] == pytest.approx(cosines.mean(), abs=1e-6)
  assert rows[0]['alignment']['error'] == pytest.approx(cosines.std(ddof=1) / 15**0.5, abs=1e-6)
  assert rows[1]['alignment']['mean'] < rows[0]['alignment']['mean']
  measured = measurement.read_all(str(out / 'rejection.json'))
  assert list(measured) == ['share=0.25/reference', 'share=1/reference']
  assert measured['share=0.25/reference'].subject['accepted'] == 1
  assert Image.open(out / 'rejection.png').size == (560, 400)
  content, count = (out / 'rejection.json').read_bytes(), len(pipeline.generated)
  run(*command)
  assert (out / 'rejection.json').read_bytes() == content and len(pipeline.generated) == count
  run(*command, '0.5')
  assert len(pipeline.generated) == count
  with pytest.raises(UserError, match='another run, with seed 0'):
    run(*command, '--seed=1')
  # Not the folder of the samples alone, nor the other way around.
  alone = [*flags, '--label=id', '--num_images=4']
  with pytest.raises(UserError, match='another run, with ranker'):
    run(*alone, f'--output_dir={out}')
  run(*alone, f'--output_dir={tmp_path}/alone')
  with pytest.raises(UserError, match='another run, with rejection None'):
    run(*command, f'--output_dir={tmp_path}/alone')
