"""`parti-jax prompts`: generates pictures for the prompts of PartiPrompts or another benchmark.

Those of PartiPrompts are shown on a page; `benchmark_prompts` has the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import tqdm
from PIL import Image

from parti_jax.cli import benchmark_prompts
from parti_jax.cli import model_flags
from parti_jax.cli import sampling_flags
from parti_jax.core import texts as texts_lib
from parti_jax.core.errors import UserError
from parti_jax.evaluation import html_page
from parti_jax.evaluation import output_folder
from parti_jax.evaluation.benchmarks import drawing
from parti_jax.evaluation.benchmarks import registry
from parti_jax.evaluation.datasets import prompts_file
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import sheets

# Pictures to generate between two writes; a stopped run loses at most this many.
_AT_ONCE = 64
_RESULT_FILE = 'result.json'
_PARTI_PROMPTS = 'parti_prompts'
_NUM_IMAGES = 4
# Maximum prompts on the contact sheet of a category.
_SHOWN = 120


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument(
    'file',
    metavar='FILE',
    nargs='?',
    help='PartiPrompts.tsv or a similar file, with the columns Prompt, Category, Challenge and Note, '
    'separated by tabs; with --format, '
    + '; '.join(f'{name}: {benchmark.expects}' for name, benchmark in registry.BENCHMARKS.items()),
  )
  parser.add_argument(
    '--format',
    default=_PARTI_PROMPTS,
    metavar='NAME',
    help=f'{_PARTI_PROMPTS} writes a page of the pictures; {", ".join(registry.BENCHMARKS)} write '
    'the files that the judge of this benchmark reads (default: %(default)s)',
  )
  parser.add_argument(
    '--results',
    nargs='+',
    metavar='FORMAT=PATH',
    help='generate nothing; show the results of judges as one table. '
    + '; '.join(
      f'{name}: {benchmark.results_are}' for name, benchmark in registry.BENCHMARKS.items()
    ),
  )
  model_flags.add_model(parser)
  model_flags.add_replacement(parser, 'ranker')
  parser.add_argument(
    '--output_dir',
    metavar='DIR',
    help='output folder; give the same folder to resume a stopped run (default: the name of the '
    'format, or benchmark_results for --results)',
  )
  parser.add_argument(
    '--num_images',
    type=int,
    help='number of pictures for each prompt, best first on the page if the model has a ranker '
    f'(default: {_NUM_IMAGES}, or that of the benchmark: '
    + ', '.join(f'{name} {found.num_images}' for name, found in registry.BENCHMARKS.items())
    + ')',
  )
  parser.add_argument(
    '--max_prompts', type=int, metavar='N', help='use only the first N prompts (default: all)'
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='seed of the pictures (default: %(default)s)'
  )
  sampling_flags.add_arguments(parser)
  sampling_flags.add_precision(parser)
  parser.add_argument(
    '--batch_size',
    type=int,
    help='number of pictures to generate at once; affects memory, not the pictures',
  )


def run(args: argparse.Namespace) -> int:
  """Generates the missing pictures, writes the page or layout, and prints the file names.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, a file of another form, a prompt that the model can't read, or an output folder
      that can't be written or holds another run.
  """
  sampling_flags.check_numbers(args, 'num_images', 'batch_size', 'max_prompts')
  if args.results:
    if args.file is not None:
      raise UserError(f'--results generates nothing, so leave out {args.file}')
    if args.format != _PARTI_PROMPTS:
      raise UserError(
        f'--results generates nothing; leave out --format, and give {args.format}=PATH as the results'
      )
    args.output_dir = args.output_dir or 'benchmark_results'
    return benchmark_prompts.show_results(args)
  if args.format != _PARTI_PROMPTS and args.format not in registry.BENCHMARKS:
    raise UserError(
      f'--format: unknown format {args.format!r}; choose from '
      f'{", ".join([_PARTI_PROMPTS, *registry.BENCHMARKS])}'
    )
  if args.file is None:
    raise UserError('give the file of prompts, such as PartiPrompts.tsv, or --results')
  args.output_dir = args.output_dir or args.format
  if args.format != _PARTI_PROMPTS:
    return benchmark_prompts.draw(args)
  args.num_images = args.num_images or _NUM_IMAGES
  sampling = sampling_flags.overriding(args)
  precision = sampling_flags.given_precision(args)
  prompts = prompts_file.read(args.file)[: args.max_prompts]
  model = model_flags.load(args)
  drawing.cut_prompts(model, prompts)  # Raises an error before the first picture, not after hours.
  folder = output_folder.make(args.output_dir)
  output_folder.claim(
    folder,
    {
      'num_images': args.num_images,
      'seed': args.seed,
      'sampling': sampling | precision,
      'model': output_folder.model_fingerprint(args.model),
      'ranker': output_folder.ranker_fingerprint(args.ranker),
    },
  )
  (folder / 'pictures').mkdir(exist_ok=True)
  _draw(model, prompts, folder, args, sampling)
  ranked = model.ranker is not None
  results = [_result(folder, prompt) for prompt in prompts]
  for path in _write_pages(folder, results, ranked, args, model.model_name, sampling | precision):
    print(path)
  return 0


def _prompt_folder(folder: pathlib.Path, prompt: prompts_file.Prompt) -> pathlib.Path:
  """Returns the folder of a prompt's pictures, which exists once all of them are written."""
  # The name depends on the text, so a file with other prompts doesn't find these pictures.
  text = output_folder.fingerprint(prompt.text.encode())[:6]
  number, pictures = f'{prompt.number:04d}', folder / 'pictures'
  found = pictures / f'{number}_{images_lib.slug(prompt.text)}_{text}'
  if prompt.text.isascii() or found.is_dir():
    return found
  # Other versions, and file systems without the text's letters, have other words in the middle.
  return next(iter(sorted(pictures.glob(f'{number}_*_{text}'))), found)


def _draw(
  model,
  prompts: Sequence[prompts_file.Prompt],
  folder: pathlib.Path,
  args: argparse.Namespace,
  sampling: dict,
):
  """Generates pictures, in groups, for the prompts that have no folder yet."""
  missing = [prompt for prompt in prompts if not _prompt_folder(folder, prompt).is_dir()]
  group = max(1, _AT_ONCE // args.num_images)
  with tqdm.tqdm(
    total=len(prompts),
    initial=len(prompts) - len(missing),
    desc='generating',
    unit='prompt',
    disable=None,
    file=sys.stderr,
  ) as bar:
    for start in range(0, len(missing), group):
      chosen = missing[start : start + group]
      texts = [prompt.text for prompt in chosen]
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        drawn = model.generate(
          texts,
          num_images=args.num_images,
          seed=args.seed,
          batch_size=args.batch_size,
          rank=model.ranker is not None,
          **sampling,
        )
      cut = _left_out([str(warning.message) for warning in caught], texts)
      for row, prompt in enumerate(chosen):
        _save(_prompt_folder(folder, prompt), _of_one(drawn, row), cut.get(row, ''))
      bar.update(len(chosen))


def _left_out(messages: Sequence[str], texts: Sequence[str]) -> dict[int, str]:
  """Returns row -> what the model and its ranker say about a prompt that they cut.

  Args:
    messages: their warnings. The model counts prompts, and the ranker those that differ.
    texts: the prompts.
  """
  different = list(dict.fromkeys(texts))
  found: dict[int, list[str]] = {}
  for message in messages:
    match = re.match(r'(prompt|text) (\d+) is (.*)', message, re.DOTALL)
    if match is None:
      continue
    text = (texts if match[1] == 'prompt' else different)[int(match[2]) - 1]
    for row, other in enumerate(texts):
      if other == text and match[3] not in found.setdefault(row, []):
        found[row].append(match[3])
  return {row: '; '.join(said) for row, said in found.items()}


def _of_one(drawn, row: int):
  """Returns the part of a Result for one prompt."""
  arrays = {
    field.name: value[row : row + 1]
    for field in dataclasses.fields(drawn)
    if isinstance(value := getattr(drawn, field.name), (np.ndarray, list))
  }
  return dataclasses.replace(drawn, **arrays)


def _save(folder: pathlib.Path, drawn, cut: str):
  """Writes a prompt's pictures and their scores atomically."""
  temporary = folder.with_name(f'.{folder.name}.{os.getpid()}')
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    files = drawn.save(temporary)
    scores = [None] * len(files) if drawn.scores is None else drawn.scores[0].tolist()
    indices = range(len(files)) if drawn.image_index is None else drawn.image_index[0].tolist()
    pictures = [
      {'file': file.name, 'score': score, 'image_index': index}
      for file, score, index in zip(files, scores, indices)
    ]
    content = json.dumps({'pictures': pictures, 'cut': cut}, ensure_ascii=False, indent=2)
    (temporary / _RESULT_FILE).write_text(content + '\n', encoding='utf-8')
    os.replace(temporary, folder)
  except OSError as error:
    raise UserError(f'{folder} cannot be written ({error.strerror or error})') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _result(folder: pathlib.Path, prompt: prompts_file.Prompt) -> dict:
  """Returns a prompt's entry in prompts.json."""
  found = _prompt_folder(folder, prompt)
  try:
    content = json.loads((found / _RESULT_FILE).read_text(encoding='utf-8'))
    pictures = [
      picture | {'file': str(pathlib.PurePosixPath('pictures', found.name, picture['file']))}
      for picture in content['pictures']
    ]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{found} is damaged; delete it, and run again to generate its pictures'
    ) from error
  return {
    'number': prompt.number,
    'prompt': prompt.text,
    'category': prompt.category,
    'challenge': prompt.challenge,
    'note': prompt.note,
    'cut': content['cut'],
    'pictures': pictures,
  }


def _write_pages(
  folder: pathlib.Path,
  results: Sequence[dict],
  ranked: bool,
  args: argparse.Namespace,
  model_name: str,
  sampling: dict,
) -> list[pathlib.Path]:
  """Writes the page, the JSON and the contact sheets; returns their files."""
  settings = ', '.join(f'{key} {value}' for key, value in sampling.items())
  about = (
    f'Model {model_name}, {args.num_images} pictures per prompt, seed {args.seed}, sampling: '
    f'{settings or "the model defaults"}.'
  )
  title = f'{pathlib.Path(args.file).stem}: {texts_lib.counted(len(results), "prompt")}'
  content = {
    'file': pathlib.Path(args.file).name,
    'model': model_name,
    'seed': args.seed,
    'num_images': args.num_images,
    'ranked': ranked,
    'sampling': sampling,
    'prompts': list(results),
  }
  files = {
    'index.html': html_page.page(title, about, results, ranked).encode(),
    'prompts.json': (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode(),
  }
  categories = sorted({result['category'] for result in results})
  for category, name in images_lib.distinct_names(categories).items():
    files[f'{name}.png'] = output_folder.png(_sheet(folder, category, results, ranked))
  for name, data in files.items():
    output_folder.write(folder / name, data)
  return [folder / name for name in files]


def _sheet(
  folder: pathlib.Path, category: str, results: Sequence[dict], ranked: bool
) -> Image.Image:
  """Makes a sheet of a category's prompts, each with its first picture."""
  members = [result for result in results if result['category'] == category]
  shown = members[:_SHOWN]
  first = "the ranker's best" if ranked else 'the first'
  images = []
  for result in shown:
    with Image.open(folder / result['pictures'][0]['file']) as picture:
      images.append([np.asarray(picture.convert('RGB'))])
  return sheets.sheet(
    f'{category}: {len(shown)} of {len(members)} prompts, each with {first} of '
    f'{len(shown[0]["pictures"])} pictures',
    [result['prompt'] for result in shown],
    images,
  )
