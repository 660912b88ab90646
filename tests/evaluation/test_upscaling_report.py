"""The numbers of super-resolution checked with numpy, for networks with known results."""

import json
import types

import numpy as np
import pytest

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.evaluation import upscaling_report


def fake(upscale):
  """A pipeline whose tokenizer darkens, and whose super-resolution is `upscale`."""
  return types.SimpleNamespace(
    image_size=4,
    upscaler=types.SimpleNamespace(factor=2),
    upscale=upscale,
    reconstruct=lambda images: images // 2,
  )


def blocks(images):
  return images.repeat(2, axis=1).repeat(2, axis=2)


def pictures(count):
  """Pictures of squares of 2×2 equal pixels, which averaging preserves."""
  draw = np.random.default_rng(0)
  return list(blocks(draw.integers(40, 216, (count, 4, 4, 3)).astype(np.uint8)))


def test_psnr_of_a_perfect_network_and_of_the_tokenizers_loss():
  images = pictures(35)
  report, sample = upscaling_report.evaluate(fake(blocks), iter(images), num_samples=5)
  assert (report.small_size, report.large_size) == (4, 8)
  assert all(len(values) == 35 for how in report.psnr.values() for values in how.values())
  # Enlarged without error: as many decibels as the formula allows.
  np.testing.assert_allclose(report.psnr['averaged']['super_resolution'], 108.13, atol=0.01)
  dark = np.stack(images) // 2
  expected = -10 * np.log10(np.mean(((np.stack(images) - dark) / 255) ** 2, axis=(1, 2, 3)))
  np.testing.assert_allclose(report.psnr['tokenizer']['super_resolution'], expected, rtol=1e-6)
  assert (report.psnr['averaged']['bicubic'] < 40).all()
  assert sample.pictures.shape == (5, 8, 8, 3) and sample.inputs.shape == (5, 4, 4, 3)
  np.testing.assert_array_equal(sample.pictures[0], images[0])
  np.testing.assert_array_equal(sample.super_resolution[-1], dark[-1])
  assert upscaling_report.sheet(sample).size == (2 * 4 * 8, 2 * 8)


def test_the_table_and_the_json_say_the_same():
  report, _ = upscaling_report.evaluate(fake(blocks), iter(pictures(3)))
  lines = report.text().splitlines()
  means = report.json()['psnr']['tokenizer']
  difference = report.psnr['tokenizer']['super_resolution'] - report.psnr['tokenizer']['bicubic']
  assert (
    f'| {means["bicubic"]:.2f} | {means["super_resolution"]:.2f} | '
    f'{difference.mean():+.2f} ± {difference.std(ddof=1) / 3**0.5:.2f} |'
  ) in lines[2]
  assert '3 pictures, 4 to 8 pixels' in lines[0]
  json.dumps(report.json())


@pytest.mark.parametrize('count', [1, 2, 3])
def test_few_pictures_cause_a_remark_and_are_shown(count):
  report, sample = upscaling_report.evaluate(fake(blocks), iter(pictures(count)))
  assert 'over fewer than 30 pictures are rough' in report.text()
  assert upscaling_report.sheet(sample).size == (min(2, count) * 4 * 8, 8)
  report, _ = upscaling_report.evaluate(fake(blocks), iter(pictures(30)))
  assert 'Standard errors' not in report.text()


def test_no_pictures():
  with pytest.raises(UserError, match='no picture'):
    upscaling_report.evaluate(fake(blocks), iter([]))


def test_bad_flags(capsys):
  for count in (0, 2**40):
    assert main.main(['evaluate_upscaling', f'--max_pictures={count}']) == 2
    assert f'--max_pictures={count}' in capsys.readouterr().err
