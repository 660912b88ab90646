"""`parti-jax own_pictures`: trains a model on captioned pictures and samples pictures from it."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import time
from collections.abc import Iterable

from parti_jax.cli import own_plan
from parti_jax.core import checks
from parti_jax.core import gin_config
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError

# Number of steps to time, and number of steps between two readings of the clock.
_TIMED_STEPS, _TIMED_EVERY = 30, 10
# The tokenizer's share of the training time.
_SHARE = 0.4
_MOST_MEASURED = 100_000


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument(
    'folder',
    metavar='FOLDER',
    help='folder of pictures with captions.jsonl (or metadata.jsonl), of pictures with a .txt file '
    'each, or of tar shards',
  )
  parser.add_argument('prompts', nargs='+', metavar='PROMPT', help='what to draw after training')
  parser.add_argument(
    '--output_dir',
    default='runs/own_pictures',
    metavar='DIR',
    help='output folder; a command with the folder of an earlier one resumes it (default: '
    '%(default)s)',
  )
  parser.add_argument(
    '--from',
    dest='base',
    metavar='MODEL',
    help='a model folder, such as parti_jax/demo or one that `parti-jax import generator` wrote: its '
    'generator is trained further; its vocabulary and image tokenizer stay as they are',
  )
  parser.add_argument(
    '--finetune',
    choices=tuple(own_plan.FINETUNE),
    help='with --from, what is trained: all of the generator, its image decoder alone, or adapters '
    '(LoRA) (default: all)',
  )
  parser.add_argument(
    '--minutes',
    type=float,
    default=60,
    help='approximate training time (default: %(default)s)',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    metavar='PIXELS',
    help='height and width of the pictures (default: 64 on a CPU, else 128)',
  )
  parser.add_argument(
    '--num_images',
    type=int,
    default=4,
    help='number of pictures for each prompt (default: %(default)s)',
  )


def run(args: argparse.Namespace) -> int:
  """Trains what is missing and samples pictures; prints the commands and the files.

  Returns:
    The exit status: 0, or that of a command that failed or was interrupted. The status is 75 after
    an interruption, and the same command then resumes.
  """
  checks.number('--minutes', args.minutes, 0.1, 100_000)
  checks.count('--num_images', args.num_images)
  checks.texts('prompt', args.prompts)
  # gin can't register names after it has parsed values.
  from parti_jax.data import datasets  # noqa: F401
  from parti_jax.training import configurables  # noqa: F401

  if args.base is not None and not args.base.strip():
    raise UserError('--from is empty; give a model folder, or leave the flag out')
  if args.finetune and not args.base:
    raise UserError(f'--finetune={args.finetune} needs --from, the model to train further')
  begun = time.monotonic()
  work = _Work(args.output_dir, _plan(args))
  parts = () if work.plan.base else (work.vocabulary, work.tokenizer)
  for step in (*parts, work.tokens):
    if status := step():
      return status
  left = 60 * work.plan.minutes - (time.monotonic() - begun)
  for step in (lambda: work.generator(left), work.export):
    if status := step():
      return status
  return work.draw(args.prompts, args.num_images)


def _plan(args: argparse.Namespace) -> own_plan.Plan:
  """Returns the plan in the output folder, or makes a new one."""
  import jax

  from parti_jax.data import sources

  folder, base = (
    path if not path or storage.is_url(path) else os.path.abspath(path)
    for path in (args.folder, args.base or '')
  )
  plan = own_plan.load(args.output_dir)
  if plan is not None:
    _check_same(args, plan, folder, base)
    if plan.minutes != args.minutes:
      print(f'resuming with --minutes={plan.minutes:g}, the value at the start')
    return plan
  # Before the captions are read, which may take long.
  model = _base_model(args, base) if base else None
  source = own_plan.find_source(folder)
  gin_config.parse([], source)
  captions = sources.configured(sources.chosen()).captions('train')
  backend, devices = jax.default_backend(), jax.device_count()
  if model is None:
    plan = own_plan.make(folder, source, captions, args.minutes, backend, devices, args.image_size)
  else:
    finetune, size = args.finetune or 'all', model.tokenizer_config.image_size
    plan = own_plan.finetuning(
      folder, source, captions, args.minutes, backend, devices, base, finetune, size
    )
    _report_cut(model, sources.configured(sources.chosen()).captions('train'))
  plan.save(args.output_dir)
  height, width = image_sizes.sides(plan.image_size)
  print(
    f'{plan.examples:,} captioned pictures in {folder}; drawing {height} × '
    f'{width} pixels after about {plan.minutes:g} min of training'
  )
  if plan.examples < 100 and not plan.base:
    print(
      'The model will memorize so few pictures; a prompt that differs from all captions gives a '
      'mixture of them.'
    )
  return plan


def _check_same(args: argparse.Namespace, plan: own_plan.Plan, folder: str, base: str) -> None:
  """Raises UserError if the output folder has the plan of another command."""
  if plan.folder != folder or args.image_size not in (None, plan.image_size):
    raise UserError(
      f'{args.output_dir} belongs to the pictures in {plan.folder} at '
      f'{image_sizes.text(plan.image_size)} pixels; '
      'choose another --output_dir'
    )
  if plan.base != base or (base and args.finetune not in (None, plan.finetune)):
    begun = f'--from={plan.base} --finetune={plan.finetune}' if plan.base else 'no --from'
    raise UserError(
      f'{args.output_dir} belongs to a training with {begun}; choose another --output_dir'
    )


def _base_model(args: argparse.Namespace, base: str):
  """Reads the model to train further, a `model_folder.Model`.

  Raises:
    UserError: if the folder isn't a whole model, or --image_size is not that of its pictures.
  """
  from parti_jax.exported_model import model_folder

  try:
    model = model_folder.load(base)
  except UserError as error:
    raise UserError(f'--from={args.base}: {error}') from error
  size = model.tokenizer_config.image_size
  if args.image_size not in (None, size):
    raise UserError(
      f'--image_size={args.image_size}: the model {args.base} draws {image_sizes.text(size)} pixels; '
      'leave the flag out'
    )
  return model


def _report_cut(model, captions: Iterable[str]) -> None:
  """Prints how many of the captions a model reads without their end."""
  from parti_jax.data import text_tokenizer

  vocabulary = text_tokenizer.open_tokenizer(model.vocabulary_path)
  length = model.generator_config.text_length
  cut = [
    bool(vocabulary.encode(caption, length)[1])
    for caption in itertools.islice(captions, _MOST_MEASURED)
  ]
  if any(cut):
    print(
      f'{sum(cut):,} of {len(cut):,} captions are longer than the {length} text tokens of the model, '
      'which does not see the rest'
    )


class _Work:
  """The steps of the command; each does only what the output folder lacks.

  Args:
    output_dir: the folder.
    plan: the plan.
  """

  def __init__(self, output_dir: str, plan: own_plan.Plan):
    self._folder, self.plan = output_dir, plan
    self._vocabulary, self._tokenizer, self._tokens, self._generator, self._model = (
      os.path.join(output_dir, name)
      for name in ('vocabulary.model', 'tokenizer', 'tokens', 'generator', 'model')
    )
    if plan.base:
      self._tokenizer = plan.base

  def vocabulary(self) -> int:
    """Trains the vocabulary, and measures the number of tokens of the captions."""
    if not os.path.exists(self._vocabulary):
      status = self._command(
        'vocabulary',
        f'--gin_file={self._data()}',
        f'--size={self.plan.vocabulary_size}',
        '--at_most',
        '--model_type=bpe',
        '--character_coverage=1',
        f'--output={self._vocabulary}',
      )
      if status:
        return status
    if not self.plan.text_length:
      self.plan.text_length = self._text_length()
      self.plan.save(self._folder)
    return 0

  def tokenizer(self) -> int:
    """Trains the image tokenizer."""
    bindings = [f'include {self._data()!r}', *self.plan.sizes['tokenizer']]
    return self._train('tokenizer', self._tokenizer, bindings, 60 * _SHARE * self.plan.minutes)

  def tokens(self) -> int:
    """Tokenizes the pictures, unless the folder has their tokens from this tokenizer."""
    from parti_jax.data import token_cache_info
    from parti_jax.training.objectives import frozen_tokenizer

    if os.path.exists(os.path.join(self._tokens, 'info.json')):
      try:
        info = token_cache_info.read_info(self._tokens)
      except UserError:  # Damaged, or of an earlier version.
        info = {'splits': {}}
      if 'train' in info['splits'] and (
        info['tokenizer'] == frozen_tokenizer.load(self._tokenizer).fingerprint
      ):
        return 0
      shutil.rmtree(self._tokens)
    return self._command(
      'tokenize',
      f'--gin_file={self._data()}',
      '--splits',
      'train',
      f'--tokenizer={self._tokenizer}',
      f'--output_dir={self._tokens}',
      '--overwrite',
    )

  def generator(self, seconds: float) -> int:
    """Trains the generator; `seconds` is the training time if the training has not begun."""
    if self.plan.base:
      file, bindings = own_plan.FINETUNE[self.plan.finetune]
      bindings = [
        *bindings,
        f'MODEL = {self.plan.base!r}',
        f'token_cache.path = {self._tokens!r}',
        f"imported_generator.dtype = '{self.plan.dtype}'",
      ]
      return self._train('generator', self._generator, bindings, seconds, file)
    bindings = self.plan.sizes['generator'] + [
      f'token_cache.path = {self._tokens!r}',
      f'vocabulary.path = {self._vocabulary!r}',
      f'PartiConfig.text_vocabulary = {self._load_vocabulary().size}',
      f'PartiConfig.text_length = {self.plan.text_length}',
      f'GeneratorObjective.tokenizer = {self._tokenizer!r}',
    ]
    return self._train('generator', self._generator, bindings, seconds)

  def export(self) -> int:
    """Writes the trained parts to a model folder."""
    if self.plan.base:
      return self._command(
        'export',
        f'--base={self.plan.base}',
        f'--generator={self._generator}',
        f'--output_dir={self._model}',
        '--overwrite',
      )
    return self._command(
      'export',
      f'--tokenizer={self._tokenizer}',
      f'--generator={self._generator}',
      f'--vocabulary={self._vocabulary}',
      '--guidance_scale=1.5',
      f'--output_dir={self._model}',
      '--overwrite',
    )

  def draw(self, prompts: list[str], num_images: int) -> int:
    """Samples pictures for the prompts."""
    return self._command(
      'generate',
      *prompts,
      f'--model={self._model}',
      f'--num_images={num_images}',
      f'--output_dir={os.path.join(self._folder, "drawings")}',
    )

  def _train(
    self, part: str, model_dir: str, bindings: list[str], seconds: float, file: str = ''
  ) -> int:
    lines = [
      f"include 'gin_configs/runs/{file or f'own_{part}'}.gin'",
      *bindings,
      f'train.batch_size = {self.plan.batch_size}',
    ]
    if part not in self.plan.steps:
      self.plan.steps[part] = own_plan.num_steps(
        seconds, self._seconds_per_step(part, self._gin_file(part, lines)), self.plan
      )
      self.plan.save(self._folder)
    lines += own_plan.schedule(part, self.plan.steps[part])
    return self._command(
      'train', f'--gin_file={self._gin_file(part, lines)}', f'--model_dir={model_dir}'
    )

  def _seconds_per_step(self, part: str, file: str) -> float:
    """Measures the time of a training step, in a temporary run."""
    from parti_jax.core import compilation_cache
    from parti_jax.training import train_loop

    print(f'timing {_TIMED_STEPS} steps of the {part}')
    compilation_cache.enable()
    gin_config.parse(
      [file],
      [
        *own_plan.schedule(part, _TIMED_STEPS),
        f'train.log_every = {_TIMED_EVERY}',
        'train.pictures_every = 0',
        'train.checkpoint_every = 0',
      ],
    )
    folder = os.path.join(self._folder, f'timing_{part}')
    shutil.rmtree(folder, ignore_errors=True)
    try:
      rate = train_loop.train(folder)['examples_per_second']
    finally:
      shutil.rmtree(folder, ignore_errors=True)
    return self.plan.batch_size / rate

  def _text_length(self) -> int:
    from parti_jax.data import sources

    gin_config.parse([], self.plan.source)
    captions = sources.configured(sources.chosen()).captions('train')
    vocabulary = self._load_vocabulary()
    return own_plan.text_length(
      [
        len(vocabulary.encode_whole(caption))
        for caption in itertools.islice(captions, _MOST_MEASURED)
      ]
    )

  def _load_vocabulary(self):
    from parti_jax.data import vocabulary

    return vocabulary.TextVocabulary(self._vocabulary)

  def _data(self) -> str:
    return self._gin_file('data', ['import parti_jax.data.datasets', *self.plan.source])

  def _gin_file(self, name: str, lines: list[str]) -> str:
    """Writes a gin file to the output folder and returns its path."""
    path = os.path.abspath(os.path.join(self._folder, f'{name}.gin'))
    storage.write(path, '\n'.join(lines) + '\n')
    return path

  def _command(self, *arguments: str) -> int:
    """Prints a command and runs it in this process, which already uses the device."""
    from parti_jax.cli import main

    print(f'$ parti-jax {shlex.join(arguments)}', flush=True)
    return main.main(list(arguments))
