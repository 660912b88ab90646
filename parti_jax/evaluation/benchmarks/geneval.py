"""GenEval: things, counts, colors and places, judged by an object detector.

Ghosh et al. 2023, arXiv 2310.11513. Its file evaluation_metadata.jsonl has a JSON object for each of
553 prompts, {"tag": task, "include": [...], "prompt": text}. Its judge reads FOLDER/00000/metadata.jsonl
(the prompt's line) and FOLDER/00000/samples/0000.png and so on, and writes a JSON object for each
picture to results.jsonl.
"""

from __future__ import annotations

import collections
import pathlib

import numpy as np
from jaxtyping import UInt8

from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_files
from parti_jax.evaluation.benchmarks import base

_FILE = 'the file evaluation_metadata.jsonl of GenEval'
_RESULTS = 'the file results.jsonl that evaluate_images.py of GenEval writes'
_PROMPTS = 553
# Texts of a row of the results.
_KEYS = ('filename', 'tag', 'metadata')
# In the order of the paper's table.
_TASKS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')


class GenEval(base.Benchmark):
  """GenEval."""

  title = 'GenEval'
  expects = _FILE
  num_images = 4
  results_are = _RESULTS

  def read(self, path: str) -> list[base.Prompt]:
    prompts: list[base.Prompt] = []
    for number, line in base.read_lines(path, _FILE):
      where = f'{path}, line {number}'
      row = base.parse_json(line, where, _FILE)
      for key in ('prompt', 'tag'):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
          raise UserError(f'{where}: no text {key!r}; expected {_FILE}')
      if not isinstance(row.get('include'), list):
        raise UserError(f"{where}: no list 'include', which the judge needs; expected {_FILE}")
      prompts.append(base.Prompt(row['prompt'], len(prompts), row['tag'], metadata=line))
    return prompts

  def paths(self, prompt: base.Prompt, num_images: int) -> list[str]:
    folder = f'{prompt.number:05d}'
    samples = [f'{folder}/samples/{index:04d}.png' for index in range(num_images)]
    return [f'{folder}/metadata.jsonl', *samples]

  def contents(
    self, prompt: base.Prompt, images: UInt8[np.ndarray, 'num_images height width 3']
  ) -> list[bytes]:
    return [prompt.metadata.encode() + b'\n', *map(base.png, images)]

  def next_step(self, folder: pathlib.Path, size: int, num_images: int) -> str:
    del size, num_images
    return f'python evaluation/evaluate_images.py {folder} --outfile results.jsonl --model-path ...'

  def results(self, path: str) -> base.Scores:
    found: dict[str, dict[str, list[float]]] = collections.defaultdict(
      lambda: collections.defaultdict(list)
    )
    pictures: set[str] = set()
    for number, line in enumerate(text_files.lines(base.read_results(path, _RESULTS)), 1):
      if not line.strip():
        continue
      where = f'--results {path}, line {number}'
      row = base.parse_json(line, where, _RESULTS)
      right = row.get('correct') if isinstance(row, dict) else None
      texts = [row[key] for key in _KEYS if isinstance(row, dict) and isinstance(row.get(key), str)]
      if not isinstance(right, bool) or len(texts) < len(_KEYS):
        raise UserError(f"{where}: no texts {', '.join(_KEYS)} and 'correct'; expected {_RESULTS}")
      picture, tag, metadata = texts
      if picture in pictures:
        raise UserError(f'{where}: {picture} was judged before; judge the pictures again')
      pictures.add(picture)
      # Two prompts with the same text have folders of their own.
      found[tag][f'{_prompt_folder(picture)} {metadata}'].append(float(right))
    return self._scores(found)

  def _scores(self, found: dict[str, dict[str, list[float]]]) -> base.Scores:
    tags = sorted(found, key=lambda tag: (_TASKS.index(tag) if tag in _TASKS else 99, tag))
    of_tag = {tag: base.over_prompts(found[tag]) for tag in tags}
    overall = base.mean_of(list(of_tag.values()))
    prompts = sum(map(len, found.values()))
    counts = {tag: [len(values) for values in found[tag].values()] for tag in tags}
    scores = [
      base.Score(tag, 100 * score.mean, _percent(score.error), len(counts[tag]), sum(counts[tag]))
      for tag, score in of_tag.items()
    ]
    total = sum(map(sum, counts.values()))
    scores.append(
      base.Score('overall', 100 * overall.mean, _percent(overall.error), prompts, total)
    )
    of_prompt = sorted({count for values in counts.values() for count in values})
    remarks = base.counts_remark(self.title, prompts, of_prompt, _PROMPTS)
    if missing := [task for task in _TASKS if task not in found]:
      remarks.append(f'{self.title}: overall is without {", ".join(missing)}.')
    if others := [tag for tag in found if tag not in _TASKS]:
      remarks.append(f"{self.title}: overall has {', '.join(others)}, which aren't its tasks.")
    return base.Scores(self.title, '%', scores, remarks)


def _prompt_folder(picture: str) -> str:
  """Returns the folder of a prompt, '00000' of 'images/00000/samples/0000.png'; '' without one."""
  # Its parts end at / and at \\, whatever the judge ran on.
  return pathlib.PureWindowsPath(picture).parent.parent.name


def _percent(error: float | None) -> float | None:
  return None if error is None else 100 * error
