"""`parti-jax tokenize`: image tokens of a source's pictures, computed once by a frozen tokenizer."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections.abc import Iterator

import jax
import numpy as np
import tqdm

from parti_jax import compilation_cache
from parti_jax import config
from parti_jax import errors
from parti_jax.models import vit_vqgan
from parti_jax.training import checkpoints


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax tokenize`."""
  config.add_gin_arguments(parser)
  parser.add_argument('--tokenizer', required=True,
                      help="the tokenizer's run, the --model_dir that it was trained in")
  parser.add_argument('--output_dir', required=True, help='folder of the token cache')
  parser.add_argument('--splits', nargs='+', default=['train', 'validation'],
                      help='splits of the source (default: %(default)s)')
  parser.add_argument('--batch_size', type=int, default=64, help='pictures at once')


def run(args: argparse.Namespace) -> int:
  """Writes the token cache; returns the exit status."""
  from parti_jax.data import tasks  # pylint: disable=g-import-not-at-top
  from parti_jax.data import token_cache
  if args.batch_size < 1:
    raise errors.UserError(f'--batch_size={args.batch_size} must be at least 1')
  config.parse(args.gin_file, args.gin_bindings)
  compilation_cache.enable()
  model, params = load_tokenizer(args.tokenizer)
  info = {'codebook_size': model.codebook_size, 'image_tokens': model.image_length,
          'tokenizer': fingerprint(params)}
  for split in args.splits:
    pictures = tasks.pictures_and_captions(None, split, model.image_size)
    examples = tokenized(model, params, pictures, args.batch_size)
    bar = tqdm.tqdm(examples, desc=split, unit='picture', disable=not sys.stderr.isatty())
    count = token_cache.write_token_cache(args.output_dir, bar, info, split)
    print(f'{args.output_dir}: {split}: {count} pictures, {model.image_length} tokens each')
  return 0


def load_tokenizer(model_dir):
  """The image tokenizer of a run.

  Args:
    model_dir: the run's folder.

  Returns:
    Its ViTVQGANConfig, and its parameters from the newest checkpoint.

  Raises:
    UserError: if there is no finished checkpoint, or it is of another stage.
  """
  path = checkpoints.latest_checkpoint(model_dir)
  model = vit_vqgan.ViTVQGANConfig(**checkpoints.read_config(path, 'tokenizer'))
  module = vit_vqgan.ViTVQGAN(model)
  return model, checkpoints.read_params(path, module, vit_vqgan.example_inputs(model))


def fingerprint(params) -> str:
  """Hexadecimal digest of parameters, by which a token cache knows its tokenizer."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def tokenized(model: vit_vqgan.ViTVQGANConfig, params,
              pictures: Iterator[tuple[str, np.ndarray]],
              batch_size: int) -> Iterator[tuple[str, np.ndarray]]:
  """Captions with image tokens, for captions with pictures.

  Args:
    model: sizes of the tokenizer.
    params: its parameters.
    pictures: captions and pictures, uint8 [height, width, 3].
    batch_size: pictures at once; a short last batch is padded.

  Yields:
    (caption, int32 [image_length]).
  """
  module = vit_vqgan.ViTVQGAN(model)
  encode = jax.jit(lambda images: module.apply(
      {'params': params}, images.astype(np.float32) / 255.0, method='tokenize'))
  while batch := list(itertools.islice(pictures, batch_size)):
    images = np.stack([picture for _, picture in batch])
    tokens = np.asarray(encode(np.resize(images, (batch_size,) + images.shape[1:])))
    yield from zip((caption for caption, _ in batch), tokens)
