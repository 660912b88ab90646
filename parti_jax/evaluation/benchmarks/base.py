"""What a benchmark is: its prompts, the files that its judge reads, and the results it writes."""

from __future__ import annotations

import abc
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import storage
from parti_jax.core import texts
from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_files
from parti_jax.evaluation.metrics import distribution

# Names of a file or folder have at most so many bytes on all common file systems.
LONGEST_NAME = 255
# Maximum bytes of a judge's results; those of 30,000 pictures have tens of millions.
_MAX_RESULTS = 2**30


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt of a benchmark.

  Attributes:
    text: the prompt.
    number: its number within its category, from 0, in the order of the file.
    category: its category or style; '' if the benchmark has only one.
    name: what its files are named after; its meaning depends on the benchmark.
    metadata: what the benchmark's file says about it, unchanged; '' if nothing.
  """

  text: str
  number: int
  category: str = ''
  name: str = ''
  metadata: str = ''


@dataclasses.dataclass(frozen=True)
class Score:
  """A number from a judge.

  Attributes:
    name: what it measures.
    value: the number, in the unit that the benchmark publishes.
    error: standard error over prompts; None if the results don't give it.
    prompts: number of prompts; None if the results don't say.
    pictures: number of pictures; None if the results don't say.
  """

  name: str
  value: float
  error: float | None = None
  prompts: int | None = None
  pictures: int | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a judge found.

  Attributes:
    benchmark: name of the benchmark.
    unit: unit of all scores.
    scores: the scores, the overall one last.
    remarks: what makes them incomparable with published ones, such as missing pictures.
  """

  benchmark: str
  unit: str
  scores: Sequence[Score]
  remarks: Sequence[str] = ()


class Benchmark(abc.ABC):
  """A benchmark.

  Attributes:
    title: its name in text.
    expects: description of the prompts that `read` takes, for help and messages.
    num_images: the pictures of each prompt in its published protocol.
    picture_format: format of the files of pictures.
    results_are: description of the results that `results` takes.
  """

  title: str
  expects: str
  num_images: int
  picture_format = 'PNG'
  results_are: str

  @abc.abstractmethod
  def read(self, path: str) -> list[Prompt]:
    """Reads the prompts.

    Raises:
      UserError: the file can't be read or has another form, or the judge could not read the
        pictures of a prompt.
    """

  def check_num_images(self, num_images: int, prompts: Sequence[Prompt]) -> None:  # noqa: B027
    """Raises UserError if the judge can't read this number of pictures for each prompt."""

  def ranks(self, num_images: int) -> bool:
    """Returns whether only the ranker's best of this number of pictures is judged."""
    del num_images
    return False

  @abc.abstractmethod
  def paths(self, prompt: Prompt, num_images: int) -> list[str]:
    """Returns the files of a prompt, relative to the folder that the judge reads."""

  @abc.abstractmethod
  def contents(
    self, prompt: Prompt, images: UInt8[np.ndarray, 'num_images height width 3']
  ) -> list[bytes]:
    """Returns the contents of `paths`, in their order."""

  @abc.abstractmethod
  def next_step(self, folder: pathlib.Path, size: int, num_images: int) -> str:
    """Returns how to run the judge.

    Args:
      folder: the folder that it reads.
      size: height and width of the pictures in pixels.
      num_images: pictures of each prompt.
    """

  @abc.abstractmethod
  def results(self, path: str) -> Scores:
    """Reads the judge's results.

    Raises:
      UserError: they can't be read, or aren't those of the judge.
    """


def png(image: UInt8[np.ndarray, 'height width 3']) -> bytes:
  """Encodes a picture as PNG, without loss."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


def read_lines(path: str, what: str) -> list[tuple[int, str]]:
  """Returns (number from 1, line without surrounding whitespace) of the lines that aren't blank.

  Args:
    path: a text file.
    what: the expected file, for the message.

  Raises:
    UserError: it can't be read, or all lines are blank.
  """
  lines = text_files.lines(text_files.read(path, path))
  found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
  if not found:
    raise UserError(f'{path} has no prompts; expected {what}')
  return found


def parse_json(text: str, where: str, what: str) -> Any:
  """Parses JSON; raises UserError, which names the place and what was expected."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where}: not JSON; expected {what}') from error


def read_results(path: str, what: str) -> str:
  """Returns the text of a judge's results.

  Args:
    path: the file.
    what: the expected file, for the message.

  Raises:
    UserError: it can't be read, or is empty.
  """
  try:
    text = storage.read(path, _MAX_RESULTS).decode()
  except OSError as error:
    raise UserError(
      f'--results {path} cannot be read ({error.strerror or error}); expected {what}'
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(f'--results {path} is not text; expected {what}') from error
  if not text.strip():
    raise UserError(f'--results {path} is empty; expected {what}')
  return text


def over_prompts(values: Mapping[str, Sequence[float]]) -> distribution.Estimate:
  """Returns the mean over all pictures, and its standard error over prompts.

  Pictures of one prompt are alike, so the error over pictures would be too small. With different
  numbers of pictures, prompts count by their pictures, also in the error.

  Args:
    values: prompt -> the value of each of its pictures; at least one.
  """
  counts = np.array([len(found) for found in values.values()], np.float64)
  sums = np.array([sum(found) for found in values.values()], np.float64)
  mean = sums.sum() / counts.sum()
  if len(values) < 2:
    return distribution.Estimate(float(mean), None)
  # The linearized error of a ratio of sums.
  residuals = (sums - mean * counts) / counts.mean()
  error = np.sqrt(np.sum(residuals**2) / (len(values) - 1) / len(values))
  return distribution.Estimate(float(mean), float(error))


def mean_of(estimates: Sequence[distribution.Estimate]) -> distribution.Estimate:
  """Returns the mean of independent estimates, and its standard error."""
  errors = [estimate.error for estimate in estimates]
  known = [error for error in errors if error is not None]
  error = None if len(known) < len(errors) else sum(e**2 for e in known) ** 0.5 / len(errors)
  return distribution.Estimate(sum(estimate.mean for estimate in estimates) / len(estimates), error)


def counts_remark(title: str, prompts: int, of_prompt: Sequence[int], published: int) -> list[str]:
  """Returns remarks on numbers of prompts and pictures that differ from the published ones.

  Args:
    title: name of the benchmark.
    prompts: number of prompts in the results.
    of_prompt: the different numbers of pictures of a prompt.
    published: number of prompts in the published set.
  """
  remarks = []
  if prompts != published:
    remarks.append(
      f'{title}: {texts.counted(prompts, "prompt")}, but the published set has {published:,}.'
    )
  if len(of_prompt) > 1:
    remarks.append(
      f'{title}: some prompts have {texts.counted(min(of_prompt), "picture")} and others up to '
      f'{max(of_prompt)}; the run or its judge was interrupted.'
    )
  return remarks
