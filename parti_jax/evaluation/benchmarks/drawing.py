"""Draws the pictures of a benchmark into the layout that its judge reads; a stopped run continues.

Only finished files are in the judge's folder, since some judges take everything there for a picture:
each file is written next to that folder and then moved. A prompt is drawn again unless all of its files
are there.
"""

from __future__ import annotations

import os
import pathlib
import sys
import warnings
from collections.abc import Sequence

import tqdm

from parti_jax.core.errors import UserError
from parti_jax.evaluation.benchmarks import base
from parti_jax.evaluation.datasets import prompts_file

IMAGES = 'images'
PROTOCOL_FILE = 'protocol.json'
# Pictures to generate between two writes; a stopped run loses at most this many.
_AT_ONCE = 64


def cut_prompts(model, prompts: Sequence[base.Prompt | prompts_file.Prompt]) -> list[int]:
  """Returns the positions of the prompts that are longer than the model's text length.

  Args:
    model: the result of `parti_jax.load`.
    prompts: the prompts.

  Raises:
    UserError: the model can't read a prompt, such as one that its vocabulary leaves empty.
  """
  found = []
  for position, prompt in enumerate(prompts):
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always', UserWarning)
      try:
        model.encode_prompts([prompt.text])
      except UserError as error:
        raise UserError(f'the model cannot read the prompt {prompt.text!r}: {error}') from error
    if any(str(warning.message).startswith('prompt ') for warning in caught):
      found.append(position)
  return found


def draw(
  model,
  benchmark: base.Benchmark,
  prompts: Sequence[base.Prompt],
  folder: pathlib.Path,
  num_images: int,
  progress: bool = False,
  **settings,
) -> pathlib.Path:
  """Generates the pictures that the folder doesn't have yet.

  All pictures use one seed, but each has its own noise: picture i of prompt p is generated as picture
  p · num_images + i. If a layout has one picture for each prompt and `num_images` are drawn, it is the
  ranker's best.

  Args:
    model: the result of `parti_jax.load`.
    benchmark: the benchmark.
    prompts: its prompts, or the first of them.
    folder: the output folder, which the caller has claimed for this run.
    num_images: pictures generated for each prompt.
    progress: whether to show a bar on a terminal.
    **settings: arguments of `model.generate`.

  Returns:
    The folder for the judge.

  Raises:
    UserError: a file can't be written.
  """
  images = folder / IMAGES
  missing = [
    (position, prompt)
    for position, prompt in enumerate(prompts)
    if not all((images / path).is_file() for path in benchmark.paths(prompt, num_images))
  ]
  group = max(1, _AT_ONCE // num_images)
  with tqdm.tqdm(
    total=len(prompts),
    initial=len(prompts) - len(missing),
    desc='generating',
    unit='prompt',
    disable=None if progress else True,
    file=sys.stderr,
  ) as bar:
    for start in range(0, len(missing), group):
      chosen = missing[start : start + group]
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # `cut_prompts` has found what they say.
        drawn = model.generate(
          [prompt.text for _, prompt in chosen],
          num_images=num_images,
          first_index=[position * num_images for position, _ in chosen],
          rank=benchmark.ranks(num_images),
          **settings,
        )
      for (_, prompt), pictures in zip(chosen, drawn.images):
        paths = benchmark.paths(prompt, num_images)
        for path, content in zip(paths, benchmark.contents(prompt, pictures)):
          _write(folder, images / path, content)
      bar.update(len(chosen))
  return images


def _write(folder: pathlib.Path, path: pathlib.Path, content: bytes) -> None:
  """Writes a file in the output folder, and moves it to its path."""
  temporary = folder / f'.unfinished.{os.getpid()}'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f'{path} cannot be written ({error.strerror or error})') from error
  finally:
    temporary.unlink(missing_ok=True)
