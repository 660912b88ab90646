"""`parti-jax evaluate`: draws OpenMoji's prompts with a model and judges the pictures."""

import argparse
import io
import os
import pathlib
import tempfile

import parti_jax
from parti_jax.data import openmoji
from parti_jax.errors import UserError
from parti_jax.evaluation import contact_sheet
from parti_jax.evaluation import openmoji_report
from parti_jax.sampling import flags


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument('--model', metavar='PATH',
                      help='an exported model (default: the demo model in the package)')
  parser.add_argument('--output_dir', default='evaluation', metavar='DIR',
                      help='where report.json, report.md and contact sheets go '
                      '(default: %(default)s)')
  parser.add_argument('--splits', nargs='+', default=list(openmoji.SPLITS),
                      metavar='SPLIT', help='of ' + ', '.join(openmoji.SPLITS) +
                      ' (default: all)')
  parser.add_argument('--num_images', type=int, default=4,
                      help='pictures for each prompt (default: %(default)s)')
  parser.add_argument('--max_prompts', type=int, metavar='N',
                      help='prompts of a split at most, drawn at random (default: all)')
  parser.add_argument('--train_prompts', type=int, default=200, metavar='N',
                      help='prompts of the train split, drawn at random (default: %(default)s)')
  parser.add_argument('--seed', type=int, default=0,
                      help='of the prompts drawn and the pictures (default: %(default)s)')
  flags.add_arguments(parser)
  parser.add_argument('--rank', action='store_true',
                      help="also judge the first of each prompt's pictures by the model's ranker")
  parser.add_argument('--batch_size', type=int,
                      help='pictures drawn at once; changes the memory, not the pictures')


def run(args: argparse.Namespace) -> int:
  """Evaluates, prints the table, and writes the report and the contact sheets.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, an unknown split, or an output folder that can't be written.
  """
  _check_flags(args)
  output_dir = _make_folder(args.output_dir)
  pipeline = parti_jax.load(args.model)
  pages = {}

  def on_sample(sample):
    pages[sample.split] = contact_sheet.contact_sheet(sample)

  report = openmoji_report.evaluate(
      pipeline, args.splits, args.num_images, args.max_prompts, args.seed,
      train_prompts=args.train_prompts, on_sample=on_sample, progress=True,
      batch_size=args.batch_size, rank=args.rank, **flags.given(args))
  print(report.text())
  files = {f'{split}.png': _png(page) for split, page in pages.items()}
  files['report.md'] = report.markdown().encode()
  files['report.json'] = report.json().encode()
  for name, content in files.items():
    _write(output_dir / name, content)
    print(output_dir / name)
  return 0


def _check_flags(args: argparse.Namespace):
  """Raises UserError for values that can't be, before a model is loaded."""
  flags.given(args)
  for flag in ('num_images', 'max_prompts', 'train_prompts', 'batch_size'):
    value = getattr(args, flag)
    if value is not None and value < 1:
      raise UserError(f'--{flag} must be a positive number, not {value}')
  if args.seed < 0:
    raise UserError(f'--seed must not be negative, but is {args.seed}')
  for split in args.splits:
    if split not in openmoji.SPLITS:
      raise UserError(f'--splits: unknown split {split!r}; the splits are '
                      f'{", ".join(openmoji.SPLITS)}')


def _make_folder(path: str) -> pathlib.Path:
  """Makes the output folder before the long work, so that it can't fail after it."""
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(f'--output_dir {path}: cannot write there ({error.strerror}); '
                    'name another folder') from error
  return folder


def _png(page) -> bytes:
  buffer = io.BytesIO()
  page.save(buffer, 'PNG', optimize=True)
  return buffer.getvalue()


def _write(path: pathlib.Path, content: bytes):
  """Writes a file under a temporary name, then renames it: never half a file."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
