"""Tests of the table of distances between sets of pictures, and of its remarks."""

import dataclasses

import numpy as np
import pytest

from parti_jax.evaluation import distribution_report
from parti_jax.evaluation import measurement
from parti_jax.evaluation.metrics import clip_score
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.metrics import frechet


def unit(values):
  return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture(name='sets')
def fixture_sets():
  """40 captions of 20 pictures; two generated pictures per caption, shifted from the real ones."""
  rng = np.random.default_rng(0)
  real = rng.normal(size=(20, 4)).astype(np.float32)
  picture_of = np.arange(40) // 2
  caption_of = np.arange(80) // 2
  generated = real[picture_of[caption_of]] + 3
  return distribution.Sets(
    features.Features(real),
    features.Features(real + 1),
    features.Features(generated),
    caption_of,
    picture_of,
    texts=real[picture_of],
  )


def test_rows_are_compared_with_the_real_pictures(sets):
  rows = distribution.measure('fake', sets).rows
  assert list(rows) == list(distribution.ROWS)
  # A shift of all features changes only the distance of the means: 4 features, 1 and 3 away. (Each
  # generated picture occurs four times, which affects the unbiased covariance.)
  assert rows['reconstruction'].frechet_distance == pytest.approx(4 * 1**2, rel=1e-3)
  assert rows['generated'].frechet_distance == pytest.approx(4 * 3**2, rel=0.01)
  assert (rows['generated'].pictures, rows['generated'].real) == (80, 20)
  assert rows['reconstruction'].precision > rows['generated'].precision
  assert rows['generated'].inception_score is None


def test_halves_have_the_same_numbers_and_no_picture_in_common(sets):
  rows = distribution.measure('fake', sets).rows
  for row in ('generated_half', 'real_half'):
    assert (rows[row].pictures, rows[row].real) == (10, 10)
  # The generated half equals the real one of the same captions, shifted by 3.
  assert rows['generated_half'].frechet_distance > rows['real_half'].frechet_distance > 0.1


def test_alignment_is_the_mean_cosine(sets):
  rows = distribution.measure('fake', sets).rows
  real, generated = sets.real.values, sets.generated.values
  cosines = (unit(generated) * unit(real[sets.picture_of[sets.caption_of]])).sum(axis=1)
  assert rows['generated'].alignment.mean == pytest.approx(cosines.mean(), rel=1e-5)
  of_caption = cosines.reshape(40, 2).mean(axis=1)
  assert rows['generated'].alignment.error == pytest.approx(
    of_caption.std(ddof=1) / 40**0.5, rel=1e-4
  )
  assert rows['real'].alignment.mean == pytest.approx(1)
  assert rows['other_captions'].alignment.mean < 0.7


def test_published_scores_are_columns(sets):
  prefixed = np.roll(sets.texts, 1, axis=0)
  scores = [
    features.Published(clip_score.Score('first', 'A ', clip_score.clip_score), prefixed),
    features.Published(clip_score.Score('second', '', clip_score.hps_v2), sets.texts),
  ]
  table = distribution.measure('fake', dataclasses.replace(sets, published=scores))
  rows = table.rows
  generated = unit(sets.generated.values)
  for name, scale, texts in (('first', 2.5, prefixed), ('second', 100, sets.texts)):
    cosines = (generated * unit(texts[sets.caption_of])).sum(axis=1)
    cosines = np.maximum(cosines, 0) if name == 'first' else cosines
    assert rows['generated'].scores[name].mean == pytest.approx(scale * cosines.mean(), rel=1e-4)
  assert rows['real'].scores['second'].mean == pytest.approx(100, rel=1e-5)
  header, *lines = distribution_report.cells(table)
  assert header[-3:] == ['alignment', 'first', 'second']
  assert lines[2][0] == 'real pictures' and lines[2][-1].startswith('100.000')
  assert lines[-1][-1] == '-'
  assert any('CLIPScore' in note for note in distribution_report.notes([table]))
  assert len(distribution_report.notes([distribution.measure('fake', sets)])) == 1


def test_captions_of_others_belong_to_other_pictures():
  picture_of = np.array([0, 0, 1, 2, 2, 2, 3])
  for seed in range(20):
    others = distribution._pictures_of_others(picture_of, np.random.default_rng(seed))
    assert (others != picture_of).all() and set(others) == {0, 1, 2, 3}


def test_few_pictures_have_no_manifold():
  few = features.Features(np.random.default_rng(0).normal(size=(3, 2)))
  found = distribution.measure('fake', distribution.Sets(few, few, few, np.arange(3), np.arange(3)))
  assert list(found.rows) == ['generated', 'reconstruction', 'real']
  row = found.rows['generated']
  assert row.precision is None and row.recall is None and row.alignment is None
  assert row.frechet_distance == pytest.approx(0, abs=1e-6)
  header, first, *_ = distribution_report.cells(found)
  assert header == ['', 'pictures', 'against', 'Fréchet distance'] and first[1:3] == ['3', '3']


def random_sets(pictures, dim=4, logits=None, captions=True, seed=0):
  """Sets with a caption and a generated picture for each of some real pictures."""
  rng = np.random.default_rng(seed)
  drawn = lambda: features.Features(
    rng.normal(size=(pictures, dim)).astype(np.float32),
    logits and rng.normal(size=(pictures, logits)).astype(np.float32),
  )
  texts = rng.normal(size=(pictures, dim)).astype(np.float32) if captions else None
  every = np.arange(pictures)
  return distribution.Sets(drawn(), drawn(), drawn(), every, every, texts)


def test_enough_pictures_need_no_remark():
  table = distribution.measure('fake', random_sets(200))
  assert list(table.remarks) == [] and list(table.rows) == list(distribution.ROWS)
  assert distribution_report.text(table).count('\n') == len(distribution.ROWS) + 1


@pytest.mark.parametrize(
  'pictures, dim, remarks',
  [
    (1, 4, ['Omitted for too few', 'Halves: omitted', 'Alignment: over fewer than 30']),
    (3, 2, ['Omitted for too few', 'Halves: omitted', 'Alignment: over fewer than 30']),
    (
      4,
      4,
      [
        'Fréchet distance: no more pictures than the 4',
        'Precision, recall',
        'Halves',
        'Alignment',
      ],
    ),
    (99, 2, ['Precision, recall: unreliable for fewer than 100 pictures']),
    (250, 130, ['Fréchet distance: no more pictures than the 130 features']),
  ],
)
def test_too_few_pictures_cause_remarks(pictures, dim, remarks):
  table = distribution.measure('fake', random_sets(pictures, dim))
  text, markdown = distribution_report.text(table), distribution_report.markdown(table)
  for remark in remarks:
    assert sum(said.startswith(remark) for said in table.remarks) == 1, table.remarks
    assert f'\n{remark}' in text and f'\n\n{remark}' in markdown
  assert all(
    value is None or np.isfinite(value)
    for row in table.rows.values()
    for value in (row.frechet_distance, row.precision, row.recall)
  )


def test_rows_of_halves_are_named_with_their_numbers():
  (remark,) = distribution.measure('fake', random_sets(250, 130)).remarks
  assert 'generated for one half, against the other: 125' in remark
  assert 'real pictures of one half, against the other: 125' in remark and ': 250' not in remark


def test_one_picture_has_no_captions_of_others():
  rows = distribution.measure('fake', random_sets(1)).rows
  assert list(rows) == ['generated', 'reconstruction', 'real']
  assert rows['generated'].alignment.error is None
  assert rows['generated'].frechet_distance is None and rows['generated'].precision is None


@pytest.mark.parametrize('pictures', [10, 11, 100, 499])
def test_few_pictures_have_no_inception_score(pictures, monkeypatch):
  monkeypatch.setattr(distribution, '_distance', lambda pictures, real: 1.0)  # Needs no torch.
  table = distribution.measure('fake', random_sets(pictures, logits=10, captions=False))
  assert all(row.inception_score is None for row in table.rows.values())
  assert any(
    remark.startswith('Inception score: omitted for fewer than 500 pictures (generated: ')
    for remark in table.remarks
  )
  assert 'inception score' not in distribution_report.text(table)


def test_the_note_explains_the_values_that_are_shown():
  rows = {
    'generated': distribution.Row(500, 500, 1.0, inception_score=distribution.Estimate(2.0, 0.1)),
    'real': distribution.Row(500),
  }
  (note,) = distribution_report.notes([distribution.Distribution('Inception', 8, rows)])
  assert note.startswith('Fréchet distance') and 'Precision' not in note and 'cosine' not in note
  assert 'it grows with the number of pictures' in note.split('Inception score')[1]
  assert distribution_report.notes([]) == []


def test_the_table_names_its_features_and_omits_empty_columns(sets):
  table = distribution.measure('the fake network', sets)
  text, markdown = distribution_report.text(table), distribution_report.markdown(table)
  assert text.startswith('Over 4 features: the fake network\n')
  assert 'inception score' not in text and 'alignment' in text
  assert markdown.count('\n| ') == 1 + len(distribution.ROWS) + 1


def test_logits_give_an_inception_score():
  # Ten pictures of each of ten classes, each with a confident class: the score is at most 10.
  logits = np.tile(20 * np.eye(10, dtype=np.float32), (50, 1))
  sure = features.Features(np.random.default_rng(0).normal(size=(500, 4)), logits)
  found = distribution._inception_score(sure)
  assert 9 < found.mean <= 10 and found.error < 0.5
  assert distribution._inception_score(sure[:499]) is None
  other = features.Features(sure.values + 1, logits)
  assert distribution._distance(sure, other) == pytest.approx(
    frechet.frechet_distance(sure.values, other.values), rel=1e-5
  )


def test_the_error_of_the_distance_is_over_captions():
  sets = random_sets(50)
  row = distribution.measure('fake', sets).rows['generated']
  one, other = (frechet.Gaussian.of(found.values) for found in (sets.generated, sets.real))
  influence = frechet.Influence(one, other).of(sets.generated.values)
  assert row.frechet_error == pytest.approx(influence.std(ddof=1) / 50**0.5)
  # The same pictures twice don't make more captions.
  twice = np.arange(50).repeat(2)
  doubled = distribution.row(sets, sets.generated[twice], twice)
  assert doubled.frechet_error == pytest.approx(row.frechet_error, rel=0.02)
  found = measurement.of_row(row, inception=True)['fid']
  assert found.error == row.frechet_error and found.error_of.startswith('standard error over')
  table = distribution.measure('fake', random_sets(4))
  assert table.rows['generated'].frechet_error is None
  assert measurement.of_row(table.rows['generated'], inception=True)['fid'].error is None
