"""A tiny run of each objective, for processes that are killed: its data and its bindings."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from PIL import Image

OBJECTIVES = ('tokenizer', 'text_encoder', 'generator', 'super_resolution', 'ranker')
_GIN_FILES = {
  'tokenizer': ['runs/tiny_adversarial_tokenizer.gin'],
  'text_encoder': ['runs/tiny_text_encoder.gin'],
  'generator': ['runs/tiny_generator.gin'],
  'super_resolution': ['runs/super_resolution_x2.gin', 'tasks/folder.gin'],
  'ranker': ['runs/tiny_ranker.gin'],
}
# How a part of an objective comes into play within a few steps.
_BINDINGS = {
  'tokenizer': ['TokenizerObjective.revive_every = 3', 'TokenizerObjective.r1_every = 2'],
  'generator': [
    "train.eval_split = 'validation'",
    'drop_text.rate = 0.3',
    'GeneratorObjective.depth_loss_weights = (1, 2)',
  ],
  'super_resolution': [
    'train.batch_size = 8',
    'SuperResolutionObjective.image_size = 32',
    'SuperResolutionObjective.crop = 8',
    'SuperResolutionObjective.clean_share = 0.3',
    'SuperResolutionConfig.blocks = 1',
    'SuperResolutionConfig.width = 4',
    "SuperResolutionConfig.dtype = 'float32'",
    'ViTVQGANConfig.image_size = 16',
  ],
  'ranker': ['RankerObjective.reconstruct_every = 2'],
}
# Objectives that see, or draw, what a tokenizer makes of pictures.
WITH_TOKENIZER = ('generator', 'super_resolution', 'ranker')


def write_pictures(folder, size: int = 16):
  """Writes 31 pictures with captions, two of which can't be used, in two splits."""
  folder, draw = pathlib.Path(folder), np.random.default_rng(0)
  folder.mkdir(parents=True, exist_ok=True)
  for split, count in (('train', 21), ('validation', 10)):
    lines = []
    for index in range(count):
      pixels = np.empty((size, size, 3), np.uint8)
      pixels[:] = draw.integers(0, 256, 3)
      row, column = draw.integers(0, size // 2 + 1, 2)
      pixels[row : row + size // 2, column : column + size // 2] = draw.integers(0, 256, 3)
      file = f'{split}_{index:02d}.png'
      Image.fromarray(pixels).save(folder / file)
      lines.append(json.dumps({'file': file, 'caption': f'square {row} {column}'}))
    (folder / f'{split}.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  for name in ('train_04.png', 'train_13.png'):
    (folder / name).write_bytes(b'not a picture')


def write_tokens(folder):
  """Writes a token cache of 21 and 10 examples for the tiny generator."""
  from parti_jax.data import token_cache

  draw = np.random.default_rng(1)
  info = {'codebook_size': 64, 'image_tokens': 16, 'tokenizer': 'none'}
  for split, count in (('train', 21), ('validation', 10)):
    examples = [(f'picture number {i}', draw.integers(0, 64, 16)) for i in range(count)]
    token_cache.write_token_cache(str(folder), examples, info, split)


def arguments(objective: str, folder, model_dir, *bindings) -> list[str]:
  """The command line that trains an objective.

  Args:
    objective: one of OBJECTIVES.
    folder: with `pictures/`, `tokens/` and, for WITH_TOKENIZER, the run `tokenizer/`.
    model_dir: the run's folder.
    *bindings: more gin bindings, which come last.
  """
  given = [
    f"folder.path = '{folder}/pictures'",
    f"token_cache.path = '{folder}/tokens'",
    "folder.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}",
    "train.eval_split = 'validation'",
    'train.log_every = 1',
    'train.seed = 3',
    *_BINDINGS.get(objective, []),
  ]
  if objective in WITH_TOKENIZER:
    name = {
      'generator': 'GeneratorObjective',
      'super_resolution': 'SuperResolutionObjective',
      'ranker': 'RankerObjective',
    }[objective]
    given.append(f"{name}.tokenizer = '{folder}/tokenizer'")
  return [
    'train',
    *(f'--gin_file=gin_configs/{file}' for file in _GIN_FILES[objective]),
    f'--model_dir={model_dir}',
    *(f'--gin.{binding}' for binding in (*given, *bindings)),
  ]


def tokenizer_arguments(folder, *bindings) -> list[str]:
  """The command line that trains `tokenizer/` a little, for the objectives that need one."""
  return arguments(
    'tokenizer',
    folder,
    f'{folder}/tokenizer',
    'train.steps = 2',
    'train.evaluate_every = 0',
    *bindings,
  )
