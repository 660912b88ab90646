"""T2I-CompBench: attributes, relations, numbers and complex compositions.

Huang et al. 2023, arXiv 2307.06350, and 2025 (T2I-CompBench++). Each category has a file of 300 prompts,
CATEGORY_val.txt. Its judges read FOLDER/samples/PROMPT_000000.png, ten pictures for each prompt with one
sequence of numbers over all of them, and take the prompt from the name. Each writes a vqa_result.json,
[{"question_id": number, "answer": score}, ...].
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from parti_jax.core import storage
from parti_jax.core import texts
from parti_jax.core.errors import UserError
from parti_jax.evaluation.benchmarks import base

# Category -> the judge of its published score, and where that writes.
JUDGES = {
  'color': ('BLIP-VQA', 'annotation_blip'),
  'shape': ('BLIP-VQA', 'annotation_blip'),
  'texture': ('BLIP-VQA', 'annotation_blip'),
  'spatial': ('UniDet, 2D', 'labels/annotation_obj_detection_2d'),
  '3d_spatial': ('UniDet, 3D', 'labels/annotation_obj_detection_3d'),
  'numeracy': ('UniDet', 'annotation_num'),
  'non_spatial': ('CLIP', 'annotation_clip'),
  'complex': ('3-in-1', 'annotation_3_in_1'),
}
_PROMPTS = 300
_FILES = 'the folder examples/dataset of T2I-CompBench, or one of its files, such as color_val.txt'
_RESULTS = (
  'the folder of the pictures, with a folder for each category, to which its judges have written'
)
_RESULT_FILE = 'vqa_result.json'
_ENDING = '_val.txt'
_PICTURE = re.compile(r'(.*)_(\d{6})\.png')


class T2ICompBench(base.Benchmark):
  """T2I-CompBench and T2I-CompBench++."""

  title = 'T2I-CompBench'
  expects = _FILES
  num_images = 10
  results_are = _RESULTS

  def read(self, path: str) -> list[base.Prompt]:
    if not storage.is_folder(path):
      return self._read_file(path)
    there = set(storage.names(path))
    found = [category for category in JUDGES if category + _ENDING in there]
    if not found:
      raise UserError(f'{path} has none of its files, such as color_val.txt; expected {_FILES}')
    return [
      prompt
      for category in found
      for prompt in self._read_file(storage.join(path, category + _ENDING))
    ]

  def _read_file(self, path: str) -> list[base.Prompt]:
    category = storage.name(path).removesuffix('.txt').removesuffix('_val')
    if category not in JUDGES:
      raise UserError(
        f'{path}: no category {category!r}; name the file after one of {", ".join(JUDGES)}, such as '
        'color_val.txt'
      )
    prompts: list[base.Prompt] = []
    for number, line in base.read_lines(path, _FILES):
      text = line.split('\t')[0].strip()  # The training files have columns.
      if bad := next((letter for letter in '_/\0' if letter in text), None):
        raise UserError(
          f'{path}, line {number}: the prompt has {bad!r}, but the judges read it from the names of '
          'the pictures, up to the first _; write it differently'
        )
      prompts.append(base.Prompt(text, len(prompts), category))
      name = self._name(text, 0)
      if len(os.fsencode(name)) > base.LONGEST_NAME:
        raise UserError(
          f'{path}, line {number}: the prompt is too long for the name of a picture, from which the '
          f'judges read it; shorten it to {base.LONGEST_NAME - len("_000000.png")} bytes'
        )
    return prompts

  def check_num_images(self, num_images: int, prompts: Sequence[base.Prompt]) -> None:
    if num_images != self.num_images and any(prompt.category == 'complex' for prompt in prompts):
      raise UserError(
        f'--num_images={num_images}: the judge of complex takes each {self.num_images} pictures for '
        'those of a prompt; give a file of another category, or leave the flag out'
      )

  def paths(self, prompt: base.Prompt, num_images: int) -> list[str]:
    first = prompt.number * num_images
    return [
      f'{prompt.category}/samples/{self._name(prompt.text, first + index)}'
      for index in range(num_images)
    ]

  def _name(self, text: str, number: int) -> str:
    return f'{text}_{number:06d}.png'

  def contents(
    self, prompt: base.Prompt, images: UInt8[np.ndarray, 'num_images height width 3']
  ) -> list[bytes]:
    return list(map(base.png, images))

  def next_step(self, folder: pathlib.Path, size: int, num_images: int) -> str:
    del size, num_images
    return (
      f'for each category, such as color: python BLIP_vqa.py --out_dir={folder}/color, and the other '
      'judges with --outpath'
    )

  def results(self, path: str) -> base.Scores:
    if not storage.is_folder(path):
      raise UserError(f'--results {path} is not a folder; expected {_RESULTS}')
    scores, remarks, values = [], [], []
    for category, (judge, place) in JUDGES.items():
      file = storage.join(path, category, place, _RESULT_FILE)
      if not storage.exists(file):
        if storage.exists(storage.join(path, category)):
          remarks.append(f'{self.title}: no {file}, so {category} has no score ({judge}).')
        continue
      answers = _answers(file)
      of_prompt, remark = self._by_prompt(path, category, answers)
      remarks += remark
      score = base.over_prompts(of_prompt)
      values.append(score)
      scores.append(
        base.Score(f'{category} ({judge})', score.mean, score.error, len(of_prompt), len(answers))
      )
    if not scores:
      raise UserError(
        f'--results {path}: no {_RESULT_FILE} of a judge, such as color/annotation_blip/'
        f'{_RESULT_FILE}; expected {_RESULTS}'
      )
    return base.Scores(self.title, '0 to 1', scores, remarks)

  def _by_prompt(
    self, path: str, category: str, answers: dict[int, float]
  ) -> tuple[dict[str, list[float]], list[str]]:
    """Returns the scores of each prompt's pictures, by the names of these, and remarks."""
    folder = storage.join(path, category, 'samples')
    matches = [_PICTURE.fullmatch(name) for name in storage.names(folder)]
    prompt_of: dict[int, str] = {}
    for match in matches:
      if match and prompt_of.setdefault(int(match[2]), match[1]) != match[1]:
        raise UserError(
          f'--results {path}: {folder} has two pictures of number {int(match[2])}, of which the score '
          'could be either; remove those of another run, and judge the pictures again'
        )
    if unknown := sorted(answers.keys() - prompt_of.keys()):
      raise UserError(
        f'--results {path}: the judge of {category} has a score of picture {unknown[0]}, which '
        f'{folder} lacks; judge the pictures again'
      )
    of_prompt = collections.defaultdict(list)
    for number, answer in answers.items():
      of_prompt[prompt_of[number]].append(answer)
    counts = sorted({len(values) for values in of_prompt.values()})
    title = f'{self.title}, {category}'
    remarks = base.counts_remark(title, len(of_prompt), counts, _PROMPTS)
    if missing := len(prompt_of) - len(answers):
      remarks.append(f'{title}: no score of {texts.counted(missing, "picture")}.')
    return dict(of_prompt), remarks


def _answers(file: str) -> dict[int, float]:
  """Returns {number of a picture: its score}."""
  expected = f'a list of objects with question_id and answer, at most 1, in {file}'
  rows = base.parse_json(base.read_results(file, expected), f'--results {file}', expected)
  found: dict[int, float] = {}
  if not isinstance(rows, list):
    raise UserError(f'--results {file}: damaged; expected {expected}')
  for row in rows:
    try:
      number, answer = row['question_id'], float(row['answer'])
      if isinstance(number, bool) or not isinstance(number, int) or not -1 <= answer <= 1:
        raise ValueError
    except (LookupError, TypeError, ValueError) as error:
      raise UserError(f'--results {file}: damaged; expected {expected}') from error
    if number in found:
      raise UserError(f'--results {file}: picture {number} has two scores; judge them again')
    found[number] = answer
  if not found:
    raise UserError(f'--results {file} has no scores; expected {expected}')
  return found
