"""Tests of the evaluation with pipelines whose scores are known."""

import json

import evaluation_fakes as fakes
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.evaluation.openmoji import openmoji_judge
from parti_jax.evaluation.openmoji import openmoji_report
from parti_jax.evaluation.openmoji import report as report_lib


def evaluate(draw, **settings):
  settings = {'pictures': fakes.small_set(), 'render': fakes.render, **settings}
  pipeline = draw if isinstance(draw, fakes.FakePipeline) else fakes.FakePipeline(draw)
  return openmoji_report.evaluate(pipeline, **settings)


def draw_right(caption, index):
  del index
  return fakes.render(caption)


def draw_other_tone(caption, index):
  """The requested name in light if another tone is requested, and the other way round."""
  del index
  name, _, tones = caption.partition(': ')
  return fakes.render(name if tones == 'light' else f'{name}: light')


def draw_first_right(caption, index):
  """One right picture, the others white."""
  return fakes.render(caption) if index == 0 else np.full((8, 8, 3), 255, np.uint8)


def means(report, row, split=0):
  return {key: metric.mean for key, metric in report.splits[split].rows[row].items()}


def test_an_oracle_is_always_right():
  report = evaluate(draw_right)
  assert [split.split for split in report.splits] == ['train', 'validation', 'unseen_combinations']
  for index, split in enumerate(report.splits):
    for row in ('generated', 'reconstruction', 'real'):
      assert means(report, row, index)['name_top1'] == 1
      assert means(report, row, index)['name_top5'] == 1
    assert split.rows['generated']['name_top1'].standard_error == 0
  assert means(report, 'generated', 0)['tone_right'] == 1
  assert means(report, 'generated', 1)['tone_right'] is None  # Its names have no tones.
  assert [split.prompts for split in report.splits] == [38, 2, 4]


def test_another_tone_has_the_name_right_and_the_tone_wrong():
  report = evaluate(draw_other_tone, splits=['unseen_combinations'])
  for row in ('generated', 'other_tone'):
    assert means(report, row) == {'tone_right': 0, 'name_top1': 1, 'name_top5': 1}
  assert report.splits[0].rows['other_tone']['name_top1'].prompts == 4


def test_the_other_tone_reference_omits_names_without_another_tone_in_training():
  report = evaluate(draw_right, splits=['train', 'validation'])
  # All of the twelve toned names have another tone in training, and none of the six others.
  assert report.splits[0].rows['other_tone']['name_top1'].prompts == 32
  assert report.splits[1].rows['other_tone']['name_top1'].prompts == 0
  assert means(report, 'other_tone', 1)['name_top1'] is None


def test_random_pictures_are_near_the_floor():
  rng = np.random.default_rng(0)
  training = [picture for picture in fakes.small_set() if picture.split == 'train']
  report = evaluate(
    lambda *_: fakes.render(training[rng.integers(len(training))].code),
    splits=['train'],
    num_images=32,
  )
  # 38 pictures of 18 names: a random one has the requested name in at most 3 of 38.
  for row in ('generated', 'random'):
    metric = report.splits[0].rows[row]['name_top1']
    assert 0.02 < metric.mean < 0.2
    assert 0 < metric.standard_error < 0.05
  difference = means(report, 'generated')['name_top1'] - means(report, 'random')['name_top1']
  assert abs(difference) < 0.05


def test_the_share_and_its_standard_error_over_prompts():
  report = evaluate(draw_first_right, splits=['unseen_combinations'], num_images=2)
  generated = report.splits[0].rows['generated']
  assert generated['name_top5'].mean >= generated['name_top1'].mean >= 0.5
  metric = report_lib.Metric.of(np.array([[True, True], [True, False], [False, False]]))
  assert metric.mean == 0.5
  assert metric.standard_error == pytest.approx(0.5 / 3**0.5)
  assert report_lib.Metric.of(np.ones((1, 4), bool)).standard_error is None


def test_few_prompts_cause_a_remark():
  report = evaluate(draw_right, splits=['train', 'validation'], num_images=1)
  # 32 of the 38 prompts of train have another tone; validation has 2.
  assert report.splits[0].remarks() == []
  (remark,) = report.splits[1].remarks()
  assert remark.endswith('(fewest prompts of a row: name top 1: 2, name top 5: 2).')
  assert remark in report.text() and remark in report.markdown()
  assert json.loads(report.json())['splits'][1]['remarks'] == [remark]


@pytest.mark.parametrize(
  'changes',
  [{'num_images': 1.5}, {'num_images': '1'}, {'max_prompts': True}, {'train_prompts': 2**40}],
)
def test_invalid_numbers(changes):
  with pytest.raises(UserError, match=f'^{next(iter(changes))}=.* must be a whole number'):
    evaluate(draw_right, **changes)


def test_the_share_of_the_ceiling():
  class Halving(fakes.FakePipeline):
    def reconstruct(self, images):
      """Keeps every other picture and blackens the rest."""
      return images * (np.arange(len(images)) % 2 == 0).astype(np.uint8)[:, None, None, None]

  split = evaluate(Halving(draw_right), splits=['unseen_combinations']).splits[0]
  ceiling = split.rows['reconstruction']['name_top1'].mean
  assert ceiling in (0.5, 0.75)  # Black is nearest to at most one picture.
  assert split.of_ceiling('name_top1') == pytest.approx(1 / ceiling)


def test_choices_of_a_ranker_and_the_judge_among_each_prompts_pictures():
  right = lambda *rows: np.array(rows, bool)
  rows = openmoji_report._of_ranked(
    openmoji_judge.Verdicts(
      tone_judged=right(1, 1, 0),
      tone_right=right([1, 0], [0, 1], [0, 0]),
      name_top1=right([1, 0], [0, 1], [0, 0]),
      name_top5=right([1, 1], [0, 1], [1, 0]),
    )
  )
  shares = {row: [metric.mean for metric in metrics.values()] for row, metrics in rows.items()}
  assert shares == {
    'ranked_first': pytest.approx([1 / 2, 1 / 3, 2 / 3]),
    'best': pytest.approx([1, 2 / 3, 1]),
  }
  assert rows['ranked_first']['tone_right'].prompts == 2
  assert 'the first by the ranker' not in evaluate(draw_right).text()


def test_prompts_are_limited_at_random_by_the_seed():
  pipeline = fakes.FakePipeline(draw_right)
  report = evaluate(pipeline, splits=['train', 'validation'], max_prompts=20, train_prompts=5)
  assert [split.prompts for split in report.splits] == [5, 2]
  assert [split.pictures for split in report.splits] == [38, 2]
  evaluate(pipeline, splits=['train'], train_prompts=30, max_prompts=5)
  evaluate(pipeline, splits=['train'], max_prompts=5, seed=1)
  first, _, again, other = pipeline.generated
  assert first == again and first != other and len(other) == 5


def test_tokenizer_numbers():
  class Offset(fakes.FakePipeline):
    def reconstruct(self, images):
      return np.where(images < 255, images + 1, images - 1).astype(np.uint8)

  tokenizer = evaluate(Offset(draw_right), splits=['train'], train_prompts=3).splits[0].tokenizer
  assert tokenizer.pictures == 38  # The whole split, regardless of the prompts.
  assert tokenizer.psnr == pytest.approx(20 * np.log10(255))
  assert (tokenizer.codes_used, tokenizer.share_of_codes_used) == (2, 2 / 16)


def test_psnr_is_the_mean_over_pictures_and_bounded():
  images = np.zeros((3, 2, 2, 3), np.uint8)
  others = images.copy()
  others[1] = 255
  others[2] = 51
  np.testing.assert_allclose(
    openmoji_report.psnr(images, others), [100, 0, 20 * np.log10(5)], atol=1e-5
  )


def test_json_holds_all_numbers():
  report = evaluate(draw_other_tone, guidance_scale=2.0, top_k=None, batch_size=8)
  content = json.loads(report.json())
  assert content['sampling'] == {'guidance_scale': 2.0}
  assert content['duplicates'] == {'pictures': 44, 'same_tone': 0, 'same_name': 0}
  assert (content['num_images'], content['seed'], content['image_size']) == (4, 0, 8)
  unseen = content['splits'][2]
  assert unseen['rows']['generated']['tone_right'] == {'mean': 0, 'standard_error': 0, 'prompts': 4}
  assert unseen['rows']['real']['name_top1']['mean'] == 1
  assert unseen['tokenizer'] == {
    'pictures': 4,
    'psnr': pytest.approx(100),
    'codes_used': 2,
    'codebook_size': 16,
    'share_of_codes_used': 0.125,
  }
  assert unseen['of_ceiling'] == {'tone_right': 0, 'name_top1': 1, 'name_top5': 1}
  assert unseen['of_prompt'][0] == {
    'caption': 'toned 0: dark',
    'tone_right': 0,
    'name_top1': 1,
    'name_top5': 1,
  }
  assert content['splits'][1]['of_prompt'][0]['tone_right'] is None


def test_text_and_markdown_tables():
  report = evaluate(draw_other_tone)
  block = report.text().split('\n\n')[2].split('\n')
  assert block[0] == 'unseen_combinations: 4 of 4 prompts'
  assert block[1].split() == ['prompts', 'tone', 'right', 'name', 'top', '1', 'name', 'top', '5']
  assert block[2].split() == ['generated', '4', *('0.0', '±', '0.0'), *(('100.0', '±', '0.0') * 2)]
  assert len({len(line) for line in block[1:8]}) == 1  # Columns are aligned.
  assert block[8] == 'tokenizer: PSNR 100.0 dB, 2 of 16 codes used (12.5%)'
  assert '| generated | 4 | 0.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 |' in report.markdown()
  assert '| generated | 2 | - | ' in report.markdown()
  assert 'Of 44 real pictures, 0 are the same' in report.text()


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'splits': ['test']}, "unknown split 'test': the splits are train, validation"),
    ({'splits': []}, 'no split'),
    ({'num_images': 0}, 'num_images must be a positive number, not 0'),
    ({'max_prompts': -1}, 'max_prompts'),
    ({'pictures': fakes.small_set()[:1], 'splits': ['validation']}, 'validation has no pictures'),
  ],
)
def test_bad_input(settings, message):
  with pytest.raises(UserError, match=message):
    evaluate(draw_right, **settings)
