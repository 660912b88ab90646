"""DPG-Bench: long, dense prompts, judged by questions that a model of pictures and text answers.

Hu et al. 2024 (ELLA), arXiv 2403.05135. Its folder dpg_bench/prompts has 1,065 text files with a prompt
each. Its judge reads FOLDER/NAME.png for the prompt NAME.txt, of four pictures in two rows, and cuts
them out by --resolution. It appends 'path, score of each picture, their mean' for each file to
dpg-bench_DATE_results.txt, and then the scores of categories.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_files
from parti_jax.evaluation.benchmarks import base

_FOLDER = 'the folder dpg_bench/prompts of DPG-Bench, with a text file for each prompt'
_RESULTS = 'the file dpg-bench_..._results.txt that compute_dpg_bench.py writes'
_PROMPTS = 1065
_GRID = 4
_CATEGORY = re.compile(r'\t(.+): ([0-9.e+-]+|nan)')
_SCORE = re.compile(r'DPG-Bench score: ([0-9.e+-]+)')


class DPG(base.Benchmark):
  """DPG-Bench."""

  title = 'DPG-Bench'
  expects = _FOLDER
  num_images = _GRID
  results_are = _RESULTS

  def read(self, path: str) -> list[base.Prompt]:
    if not storage.is_folder(path):
      raise UserError(f'{path} is not a folder; expected {_FOLDER}')
    names = sorted(name for name in storage.names(path) if name.endswith('.txt'))
    if not names:
      raise UserError(f'{path} has no .txt file; expected {_FOLDER}')
    prompts: list[base.Prompt] = []
    for name in names:
      file, stem = storage.join(path, name), name.removesuffix('.txt')
      if '.' in stem or not stem:
        raise UserError(f'{file}: the judge reads names only up to the first dot; rename it')
      text = ' '.join(text_files.read(file, file).split())
      if not text:
        raise UserError(f'{file} has no prompt')
      prompts.append(base.Prompt(text, len(prompts), name=stem))
    return prompts

  def check_num_images(self, num_images: int, prompts: Sequence[base.Prompt]) -> None:
    del prompts
    if num_images not in (1, _GRID):
      raise UserError(
        f'--num_images={num_images}: a picture of DPG-Bench shows {_GRID} pictures in two rows, or 1'
      )

  def paths(self, prompt: base.Prompt, num_images: int) -> list[str]:
    del num_images
    return [f'{prompt.name}.png']

  def contents(
    self, prompt: base.Prompt, images: UInt8[np.ndarray, 'num_images height width 3']
  ) -> list[bytes]:
    if len(images) == 1:
      return [base.png(images[0])]
    upper, lower = (np.concatenate(list(images[start : start + 2]), axis=1) for start in (0, 2))
    return [base.png(np.concatenate([upper, lower]))]

  def next_step(self, folder: pathlib.Path, size: int, num_images: int) -> str:
    return f'PIC_NUM={num_images} bash dpg_bench/dist_eval.sh {folder} {size}'

  def results(self, path: str) -> base.Scores:
    found: dict[str, list[float]] = {}
    categories: dict[str, float | None] = {}
    stated = None
    level = ''
    for number, line in enumerate(text_files.lines(base.read_results(path, _RESULTS)), 1):
      where = f'--results {path}, line {number}'
      if match := re.fullmatch(r'(L[12]) category scores:', line):
        level = match[1]
      elif match := _CATEGORY.fullmatch(line):
        if level == 'L1':
          # The judge's mean of no answers is nan.
          categories[match[1]] = None if match[2] == 'nan' else _number(match[2], where)
      elif match := _SCORE.fullmatch(line):
        stated = _number(match[1], where)
      elif ', ' in line and not line.startswith(('Model: ', 'Image path: ', 'Save results to: ')):
        picture, values = _picture(line, where)
        if picture in found:
          raise UserError(f'{where}: {picture} was judged before; judge the pictures again')
        found[picture] = values
    if not found:
      raise UserError(f'--results {path} has no scores of pictures; expected {_RESULTS}')
    return self._scores(found, categories, stated, path)

  def _scores(
    self,
    found: dict[str, list[float]],
    categories: dict[str, float | None],
    stated: float | None,
    path: str,
  ) -> base.Scores:
    overall = base.over_prompts({name: [float(np.mean(values))] for name, values in found.items()})
    if stated is not None and abs(stated - 100 * overall.mean) > 1e-3:
      raise UserError(
        f'--results {path}: its last line states {stated:.4f}, but the pictures in it have the mean '
        f'{100 * overall.mean:.4f}; lines are missing, so judge the pictures again'
      )
    scores = [
      base.Score(name, value) for name, value in sorted(categories.items()) if value is not None
    ]
    scores.append(
      base.Score(
        'overall',
        100 * overall.mean,
        None if overall.error is None else 100 * overall.error,
        len(found),
        sum(map(len, found.values())),
      )
    )
    of_prompt = sorted({len(values) for values in found.values()})
    remarks = base.counts_remark(self.title, len(found), of_prompt, _PROMPTS)
    if of_prompt != [_GRID]:
      remarks.append(f'{self.title}: published scores are of {_GRID} pictures for each prompt.')
    if empty := sorted(name for name, value in categories.items() if value is None):
      remarks.append(f'{self.title}: the judge has no score of {", ".join(empty)}.')
    if stated is None:
      remarks.append(f'{self.title}: the judge has not finished; its last lines are missing.')
    return base.Scores(self.title, '%', scores, remarks)


def _picture(line: str, where: str) -> tuple[str, list[float]]:
  """Parses 'path, score, ..., mean', where the path may contain commas."""
  parts = line.split(', ')
  values: list[float] = []
  while len(parts) > 1 and re.fullmatch(r'[0-9.e+-]+', parts[-1]):
    values.insert(0, _number(parts.pop(), where))
  *scores, mean = values or [0.0]
  if not scores or abs(sum(scores) / len(scores) - mean) > 1e-6:
    raise UserError(f'{where}: not a path, its scores and their mean; expected {_RESULTS}')
  if not all(0 <= score <= 1 for score in scores):
    raise UserError(f'{where}: scores of pictures are shares from 0 to 1; expected {_RESULTS}')
  return ', '.join(parts), scores


def _number(text: str, where: str) -> float:
  try:
    found = float(text)
    if not math.isfinite(found):
      raise ValueError
  except ValueError as error:
    raise UserError(f'{where}: {text} is not a number; expected {_RESULTS}') from error
  return found
