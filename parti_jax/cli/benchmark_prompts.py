"""`parti-jax prompts --format` and `--results`: published benchmarks, which other programs judge."""

from __future__ import annotations

import argparse
import json
import sys

from parti_jax.cli import model_flags
from parti_jax.cli import sampling_flags
from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.evaluation import output_folder
from parti_jax.evaluation.benchmarks import drawing
from parti_jax.evaluation.benchmarks import registry
from parti_jax.evaluation.benchmarks import results

# Prompts that were cut and are named on stderr.
_NAMED = 3


def draw(args: argparse.Namespace) -> int:
  """Draws the prompts of the benchmark `args.format` in the layout of its judge.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, prompts of another form, or an output folder that can't be written or holds
      another run.
  """
  benchmark = registry.BENCHMARKS[args.format]
  num_images = benchmark.num_images if args.num_images is None else args.num_images
  sampling = sampling_flags.overriding(args)
  precision = sampling_flags.given_precision(args)
  all_prompts = benchmark.read(args.file)
  prompts = all_prompts[: args.max_prompts]
  benchmark.check_num_images(num_images, prompts)
  model = model_flags.load(args)
  image_sizes.square(model.image_size, 'judges of benchmarks take')
  if benchmark.ranks(num_images) and model.ranker is None:
    raise UserError(
      f'--num_images={num_images}: {benchmark.title} has one picture for each prompt, the best by a '
      f'ranker, which the model {model.model_name} lacks; give --ranker, or leave the flag out'
    )
  cut = drawing.cut_prompts(model, prompts)
  folder = output_folder.make(args.output_dir)
  run = {
    'format': args.format,
    'prompts': output_folder.fingerprint(
      *(f'{prompt.category}\0{prompt.text}'.encode() for prompt in all_prompts)
    ),
    'num_images': num_images,
    'seed': args.seed,
    'sampling': sampling | precision,
    'model': output_folder.model_fingerprint(args.model),
    # Where nothing is ranked, the ranker doesn't matter.
    'ranker': output_folder.ranker_fingerprint(
      args.ranker if benchmark.ranks(num_images) else None
    ),
  }
  output_folder.claim(folder, run)
  for position in cut[:_NAMED]:
    print(
      f'parti-jax: warning: longer than the text length of the model, which reads its beginning: '
      f'{prompts[position].text!r}',
      file=sys.stderr,
    )
  if cut:
    print(
      f'parti-jax: warning: {len(cut):,} of {len(prompts):,} prompts are longer', file=sys.stderr
    )
  images = drawing.draw(
    model,
    benchmark,
    prompts,
    folder,
    num_images,
    progress=True,
    seed=args.seed,
    batch_size=args.batch_size,
    **sampling,
  )
  protocol = {
    **run,
    'benchmark': benchmark.title,
    'model_name': model.model_name,
    'image_size': model.image_size,
    'prompts_drawn': len(prompts),
    'prompts_available': len(all_prompts),
    'prompts_cut': [prompts[position].text for position in cut],
    'picture_format': benchmark.picture_format,
  }
  output_folder.write(
    folder / drawing.PROTOCOL_FILE,
    (json.dumps(protocol, indent=2, ensure_ascii=False) + '\n').encode(),
  )
  print(folder / drawing.PROTOCOL_FILE)
  print(images)
  if len(prompts) < len(all_prompts):
    print(
      f'parti-jax: {len(prompts):,} of {len(all_prompts):,} prompts; run again without --max_prompts '
      'for the rest, since a judge of fewer gives other numbers',
      file=sys.stderr,
    )
  print(
    f'parti-jax: the judge of {benchmark.title}: '
    f'{benchmark.next_step(images, model.image_size, num_images)}',
    file=sys.stderr,
  )
  return 0


def show_results(args: argparse.Namespace) -> int:
  """Prints the results of judges as one table, and writes it.

  Returns:
    0, the exit status.

  Raises:
    UserError: results can't be read, or the output folder can't be written.
  """
  table = results.read(args.results)
  folder = output_folder.make(args.output_dir)
  print(table.text())
  files = {'results.md': table.markdown()}
  files |= {f'{name}.json': found.json() for name, found in table.measurements().items()}
  for name, content in files.items():
    output_folder.write(folder / name, content.encode())
    print(folder / name)
  return 0
