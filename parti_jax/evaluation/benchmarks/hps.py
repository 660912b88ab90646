"""HPSv2: human preference, as a CLIP trained on choices predicts it.

Wu et al. 2023, arXiv 2306.09341. Its benchmark has a JSON list of 800 prompts for each of four styles,
STYLE.json. Its judge reads FOLDER/STYLE/00000.jpg, one picture for each prompt, and prints a line for
each style. The folder may have nothing but styles, since it takes every entry for one. The pictures are
JPEG files in Pillow's default quality of 75, as the benchmark's own instructions write them.
"""

from __future__ import annotations

import io
import math
import pathlib
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_files
from parti_jax.evaluation.benchmarks import base

STYLES = ('anime', 'concept-art', 'paintings', 'photo')
JPEG_QUALITY = 75
_FILES = f"the folder of HPSv2's benchmark prompts, with {', '.join(f'{s}.json' for s in STYLES)}"
_RESULTS = 'the text that hpsv2.evaluate prints, in a file'
_PROMPTS = 800
# The judge prints the deviation of the means of groups of so many prompts.
_GROUP = 80
# The judge prints scores with two digits or more.
_PRINTED = 0.01
_LINE = re.compile(
  rf'(?:(.+?) +)?({"|".join(STYLES)}|Average) +(-?\d+\.\d+|nan) *\t? *(\d+\.\d+|nan)? *'
)


class HPS(base.Benchmark):
  """HPSv2 and HPSv2.1."""

  title = 'HPSv2'
  expects = f'{_FILES}, or one of these files'
  num_images = 1
  picture_format = f'JPEG, quality {JPEG_QUALITY}'
  results_are = _RESULTS

  def read(self, path: str) -> list[base.Prompt]:
    if not storage.is_folder(path):
      return self._read_file(path)
    there = set(storage.names(path))
    if missing := [f'{style}.json' for style in STYLES if f'{style}.json' not in there]:
      raise UserError(f'{path} has no {", ".join(missing)}; expected {self.expects}')
    return [
      prompt for style in STYLES for prompt in self._read_file(storage.join(path, f'{style}.json'))
    ]

  def _read_file(self, path: str) -> list[base.Prompt]:
    style = storage.name(path).removesuffix('.json')
    if style not in STYLES:
      raise UserError(f'{path}: no style {style!r}; expected {self.expects}')
    texts = base.parse_json(text_files.read(path, path), path, 'a list of prompts')
    if not isinstance(texts, list) or not texts:
      raise UserError(f'{path}: not a list of prompts; expected {self.expects}')
    for number, text in enumerate(texts):
      if not isinstance(text, str) or not text.strip():
        raise UserError(f'{path}: its entry {number} is not a prompt')
    return [base.Prompt(text, number, style) for number, text in enumerate(texts)]

  def ranks(self, num_images: int) -> bool:
    return num_images > 1

  def paths(self, prompt: base.Prompt, num_images: int) -> list[str]:
    del num_images
    return [f'{prompt.category}/{prompt.number:05d}.jpg']

  def contents(
    self, prompt: base.Prompt, images: UInt8[np.ndarray, 'num_images height width 3']
  ) -> list[bytes]:
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, 'JPEG', quality=JPEG_QUALITY)
    return [buffer.getvalue()]

  def next_step(self, folder: pathlib.Path, size: int, num_images: int) -> str:
    del size, num_images
    return f"python -c \"import hpsv2; hpsv2.evaluate('{folder}', hps_version='v2.1')\""

  def results(self, path: str) -> base.Scores:
    found: dict[str, tuple[float, float | None]] = {}
    models = set()
    for line in text_files.lines(base.read_results(path, _RESULTS)):
      if match := _LINE.fullmatch(line.strip()):
        model, style, mean, deviation = match.groups()
        models.add(model or '')
        if style in found:
          raise UserError(f'--results {path}: two scores of {style}; keep those of one model')
        found[style] = float(mean), None if deviation is None else float(deviation)
    if not found or any(not math.isfinite(mean) for mean, _ in found.values()):
      raise UserError(f'--results {path} has no scores of styles; expected {_RESULTS}')
    if 'Average' not in found:
      raise UserError(f'--results {path} has no Average; it is cut, so judge the pictures again')
    if len(models) > 1:
      raise UserError(f'--results {path} has scores of {", ".join(sorted(models))}; keep one model')
    means = [mean for style, (mean, _) in found.items() if style != 'Average']
    average = found['Average'][0]
    if means and not min(means) - _PRINTED <= average <= max(means) + _PRINTED:
      raise UserError(
        f'--results {path}: the average {average:g} is not among the scores of its styles, from '
        f'{min(means):g} to {max(means):g}; judge the pictures again'
      )
    # The deviation of the means of ten groups, of which the style's mean is the mean.
    groups = _PROMPTS // _GROUP
    scores = [
      base.Score(style, found[style][0], _error(found[style][1], groups))
      for style in STYLES
      if style in found
    ]
    scores.append(base.Score('average', found['Average'][0]))
    remarks = [
      f'{self.title}: errors assume {_PROMPTS} prompts of each style; the judge does not print how '
      'many pictures it found, nor whether its weights were v2.0 or v2.1.'
    ]
    if missing := [style for style in STYLES if style not in found]:
      remarks.append(f'{self.title}: the average is without {", ".join(missing)}.')
    return base.Scores(self.title, '100 · cosine', scores, remarks)


def _error(deviation: float | None, groups: int) -> float | None:
  return None if deviation is None else deviation / (groups - 1) ** 0.5
