"""`parti-jax export`: the trained parts as one model folder, for drawing."""

from __future__ import annotations

import argparse
import pathlib

from parti_jax import errors
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.sampling import flags
from parti_jax.sampling import model_folder
from parti_jax.sampling import settings
from parti_jax.training import checkpoints
from parti_jax.training import frozen_tokenizer


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax export`."""
  parser.add_argument('--tokenizer', required=True,
                      help="the tokenizer's run, the --model_dir that it was trained in")
  parser.add_argument('--generator', required=True,
                      help="the generator's run, the --model_dir that it was trained in")
  parser.add_argument('--vocabulary', required=True,
                      help='the SentencePiece model that the captions were tokenized with')
  parser.add_argument('--output_dir', required=True, help='the model folder to write')
  parser.add_argument('--overwrite', action='store_true', help='replace a model folder there')
  parser.add_argument('--dtype', default='float16', choices=sorted(model_folder.STORED_DTYPES),
                      help='what parameters are stored as (default: %(default)s)')
  group = parser.add_argument_group(
      'sampling', 'How the model is sampled where its user says nothing else.')
  flags.add_arguments(group, 'plain sampling')


def run(args: argparse.Namespace) -> int:
  """Writes the model folder; returns the exit status."""
  if not pathlib.Path(args.vocabulary).is_file():
    raise errors.UserError(f'--vocabulary={args.vocabulary}: there is no such file; '
                           '`parti-jax vocabulary` makes one')
  sampling = settings.SamplingSettings().replace(**flags.given(args))
  tokenizer_config, tokenizer_params = frozen_tokenizer.load(args.tokenizer)
  path = checkpoints.latest_checkpoint(args.generator)
  config = parti_config.PartiConfig(**checkpoints.read_config(path, 'generator'))
  params = checkpoints.read_params(path, parti.Parti(config), parti.example_inputs(config))
  folder = model_folder.save(
      args.output_dir, parti_config=config, parti_params=params,
      tokenizer_config=tokenizer_config, tokenizer_params=tokenizer_params,
      vocabulary_path=args.vocabulary, sampling=sampling, dtype=args.dtype,
      overwrite=args.overwrite, provenance={
          'generator_steps': int(path.name),
          'tokenizer_steps': int(checkpoints.latest_checkpoint(args.tokenizer).name)})
  size = sum(file.stat().st_size for file in folder.iterdir())
  print(f'{folder}: {size / 1e6:.1f} MB; draw with: parti-jax generate PROMPT --model={folder}')
  return 0
