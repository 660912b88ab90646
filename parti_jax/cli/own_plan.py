"""Plans `parti-jax own_pictures`: finds the captions, and chooses sizes for pictures and device."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError

FILE = 'plan.json'
# Possible names of the file and caption columns in a captions file; the first match counts.
_FILE_KEYS = ('file', 'file_name', 'filename', 'path', 'image')
_CAPTION_KEYS = ('caption', 'text', 'description', 'prompt')
_CAPTIONS_FILES = ('captions.jsonl', 'metadata.jsonl')
_LARGEST = 1 << 24
# With fewer than _FEW pictures a smaller model learns as much, and sooner.
_FEW, _MANY = 300, 1000
# What of a model's generator is trained -> its gin file in gin_configs/runs/, and further bindings.
FINETUNE = {
  'all': ('own_finetuning', []),
  'decoder': ('own_finetuning', ["GeneratorObjective.frozen = ('text_encoder',)"]),
  'lora': ('own_lora', []),
}
_VOCABULARY = (100, 16_000)


@dataclasses.dataclass
class Plan:
  """The plan of a training; stored in the output folder, so that the command can resume with it.

  Attributes:
    folder: folder of the pictures, an absolute path or a URL.
    source: gin bindings of the data.
    examples: number of captioned pictures.
    image_size: height and width of the generated pictures, in pixels; one number for squares.
    sizes: gin bindings of the networks, except those that depend on the vocabulary.
    batch_size: examples per step.
    vocabulary_size: maximum number of ids.
    minutes: minutes that training may take.
    text_length: tokens of a caption; 0 until the vocabulary is trained.
    steps: {'tokenizer' or 'generator': training steps}, once they are known.
    base: model folder that is trained further, an absolute path or a URL; '' to train a new model.
    finetune: what of it is trained, a name in FINETUNE.
    dtype: dtype to compute in, of a model that is trained further.
  """

  folder: str
  source: list[str]
  examples: int
  image_size: image_sizes.ImageSize
  sizes: dict[str, list[str]]
  batch_size: int
  vocabulary_size: int
  minutes: float
  text_length: int = 0
  steps: dict[str, int] = dataclasses.field(default_factory=dict)
  base: str = ''
  finetune: str = 'all'
  dtype: str = 'float32'

  def save(self, output_dir: str) -> None:
    """Writes the plan into the output folder."""
    storage.write(
      os.path.join(output_dir, FILE), json.dumps(dataclasses.asdict(self), indent=2) + '\n'
    )


def load(output_dir: str) -> Plan | None:
  """Reads the plan of an earlier start; None if there is none.

  Raises:
    UserError: if it is damaged.
  """
  path = os.path.join(output_dir, FILE)
  if not os.path.exists(path):
    return None
  try:
    plan = Plan(**storage.read_json(path))
    size = checks.typed('image_size', plan.image_size, image_sizes.ImageSize, 1)
    return dataclasses.replace(plan, image_size=size)
  except (ValueError, TypeError, UserError) as error:
    raise UserError(f'{path} is damaged; remove it, or choose another --output_dir') from error


def find_source(folder: str) -> list[str]:
  """Returns the gin bindings that read a folder, chosen by its contents.

  Parquet files without pictures don't count: img2dataset writes such files next to its tars.

  Args:
    folder: a path or a URL.

  Raises:
    UserError: if the folder doesn't exist, or has no captions in a known form.
  """
  from parti_jax.data.sources import hf_datasets
  from parti_jax.data.sources import parquet

  if not storage.is_folder(folder):
    raise UserError(f'{folder}: folder not found; give the folder of your pictures')
  names = storage.names(folder)
  for name in _CAPTIONS_FILES:
    if name in names:
      file_key, caption_key = _columns(storage.join(folder, name))
      return _folder(folder, name, file_key, caption_key)
  if hf_datasets.is_saved(folder):
    return ["data.source = 'hf_datasets'", f'hf_datasets.path = {folder!r}']
  if storage.glob(storage.join(folder, '**/*.tar*')):
    return [
      "data.source = 'webdataset'",
      f'webdataset.path = {folder!r}',
      "webdataset.splits = {'train': '**/*.tar*'}",
    ]
  if parquet.has_pictures(folder):
    return ["data.source = 'parquet'", f'parquet.path = {folder!r}']
  if storage.glob(storage.join(folder, '**/*.txt')):
    return _folder(folder, '**/*.txt', 'file', 'caption')
  raise UserError(
    f'{folder}: no captions found; put them into {_CAPTIONS_FILES[0]} there, with lines of the '
    'form {"file": "a/1.jpg", "caption": "..."}, or into a text file next to each picture, or give '
    'a folder of tar shards or of Parquet files with pictures'
  )


def _folder(folder: str, captions: str, file_key: str, caption_key: str) -> list[str]:
  return [
    "data.source = 'folder'",
    f'folder.path = {folder!r}',
    f"folder.splits = {{'train': {captions!r}}}",
    f'folder.file_key = {file_key!r}',
    f'folder.caption_key = {caption_key!r}',
  ]


def _columns(path: str) -> tuple[str, str]:
  """Returns the names of a captions file's file and caption columns, from its first line."""
  with storage.open_file(path, 'rt') as file:
    line = file.readline(_LARGEST)
  try:
    row = json.loads(line)
    return (
      next(key for key in _FILE_KEYS if key in row),
      next(key for key in _CAPTION_KEYS if key in row),
    )
  except (ValueError, TypeError, StopIteration) as error:
    raise UserError(
      f'{path}, line 1: expected an object with one of {", ".join(_FILE_KEYS)} and '
      f'one of {", ".join(_CAPTION_KEYS)}'
    ) from error


def make(
  folder: str,
  source: list[str],
  captions: Iterable[str],
  minutes: float,
  platform: str,
  devices: int,
  image_size: int | None = None,
) -> Plan:
  """Makes a plan with sizes that fit the pictures and the device.

  Args:
    folder: folder of the pictures.
    source: the result of `find_source`.
    captions: captions of all pictures.
    minutes: minutes that training may take.
    platform: platform of the devices, such as 'cpu'.
    devices: number of devices.
    image_size: height and width of the pictures to generate; None to choose by the device.

  Raises:
    UserError: if there are no captions, or the size is invalid.
  """
  words: set[str] = set()
  characters: set[str] = set()
  examples = 0
  for caption in captions:
    examples += 1
    words.update(caption.lower().split())
    characters.update(caption.lower())
  if not examples:
    raise UserError(f'{folder}: no picture has a usable caption')
  large = platform != 'cpu' and examples >= _MANY
  size = image_size or (64 if platform == 'cpu' else 128)
  if size % 16 or not 32 <= size <= 256:
    raise UserError(f'--image_size={size} must be a multiple of 16 from 32 to 256')
  # Few captions can't support more ids than they have words; the trainer uses fewer if it must.
  vocabulary = min(max(2 * len(words) + len(characters), _VOCABULARY[0]), _VOCABULARY[1])
  return Plan(
    folder,
    source,
    examples,
    size,
    _sizes(examples, size, large),
    max(32, devices) if examples < 20_000 else max(64, devices),
    vocabulary,
    minutes,
  )


def finetuning(
  folder: str,
  source: list[str],
  captions: Iterable[str],
  minutes: float,
  platform: str,
  devices: int,
  base: str,
  finetune: str,
  image_size: image_sizes.ImageSize,
) -> Plan:
  """Makes a plan that trains a model further, whose sizes stay.

  Args:
    folder: folder of the pictures.
    source: the result of `find_source`.
    captions: captions of all pictures.
    minutes: minutes that training may take.
    platform: platform of the devices, such as 'cpu'.
    devices: number of devices.
    base: folder of the model.
    finetune: a name in FINETUNE.
    image_size: height and width of the model's pictures; one number for squares.

  Raises:
    UserError: if there are no captions.
  """
  if not (examples := sum(1 for _ in captions)):
    raise UserError(f'{folder}: no picture has a usable caption')
  return Plan(
    folder,
    source,
    examples,
    image_size,
    {},
    max(32, devices),
    0,
    minutes,
    base=base,
    finetune=finetune,
    dtype='float32' if platform == 'cpu' else 'bfloat16',
  )


def _sizes(examples: int, image_size: int, large: bool) -> dict[str, list[str]]:
  """Returns gin bindings of the tokenizer and the generator, on top of the demo's sizes."""
  codes = 4096 if large else 1024 if examples >= _FEW else 256
  side = image_size // 8
  tokenizer = [
    f'ViTVQGANConfig.image_size = {image_size}',
    f'ViTVQGANConfig.codebook_size = {codes}',
  ]
  generator = [f'PartiConfig.grid = ({side}, {side})', f'PartiConfig.codebook_size = {codes}']
  if large:
    tokenizer += [
      'ViTVQGANConfig.encoder_layers = 4',
      'ViTVQGANConfig.encoder_width = 256',
      'ViTVQGANConfig.encoder_mlp_width = 1024',
      'ViTVQGANConfig.encoder_heads = 4',
      'ViTVQGANConfig.decoder_layers = 6',
      'ViTVQGANConfig.decoder_width = 384',
      'ViTVQGANConfig.decoder_mlp_width = 1536',
      'ViTVQGANConfig.decoder_heads = 6',
      "ViTVQGANConfig.dtype = 'bfloat16'",
    ]
    generator += [
      'PartiConfig.encoder_layers = 4',
      'PartiConfig.decoder_layers = 8',
      'PartiConfig.width = 512',
      'PartiConfig.mlp_width = 2048',
      'PartiConfig.heads = 8',
      "PartiConfig.dtype = 'bfloat16'",
    ]
  elif examples < _FEW:
    generator += [
      'PartiConfig.decoder_layers = 3',
      'PartiConfig.width = 128',
      'PartiConfig.mlp_width = 512',
      'PartiConfig.heads = 4',
    ]
  return {'tokenizer': tokenizer, 'generator': generator}


def text_length(token_counts: list[int]) -> int:
  """Returns a caption length, from 8 to 128 tokens, that 99% of the captions fit into."""
  longest = int(np.ceil(np.percentile(token_counts, 99)))
  return min(max(8, -(-longest // 8) * 8), 128)


def num_steps(seconds: float, seconds_per_step: float, plan: Plan) -> int:
  """Returns the steps that fit into a time, but no more than are useful for the pictures."""
  passes = 400 if plan.examples < _FEW else 200
  most = max(2000, passes * plan.examples // plan.batch_size)
  return int(min(max(seconds / seconds_per_step, 40), most, 200_000))


def schedule(part: str, steps: int) -> list[str]:
  """Returns the gin bindings of a training of `steps` steps."""
  every = max(steps // 4, 20)
  bindings: dict[str, Any] = {
    'STEPS': steps,
    'warmup_cosine.warmup_steps': min(200, steps // 10),
    'train.pictures_every': every,
    'train.checkpoint_every': min(every, 250),
    'train.log_every': min(50, every),
  }
  if part == 'tokenizer':
    bindings |= {
      'TokenizerObjective.quantize_from': min(300, steps // 8),
      'TokenizerObjective.revive_until': 3 * steps // 4,
    }
  return [f'{name} = {value}' for name, value in bindings.items()]
