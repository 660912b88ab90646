"""An image tokenizer that is trained and stays as it is: its loading, its name, its tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import numpy as np

from parti_jax import errors
from parti_jax import numerics
from parti_jax import storage
from parti_jax.models import vit_vqgan
from parti_jax.sampling import model_folder
from parti_jax.training import checkpoints


def is_trained(model_dir) -> bool:
  """Whether a folder is an exported model, or a run that has written a checkpoint."""
  return (storage.exists(storage.join(model_dir, model_folder.CONFIG_FILE))
          or checkpoints.has_checkpoint(model_dir))


def sizes(model_dir, of_trained: Callable[[], vit_vqgan.ViTVQGANConfig]):
  """Sizes of a tokenizer that may have to be trained first, as for a plan.

  Args:
    model_dir: its run's folder, or that of an exported model.
    of_trained: returns the sizes of the trained one.

  Returns:
    A ViTVQGANConfig: that of the trained tokenizer or, as long as there is none, that of gin.

  Raises:
    UserError: if there is a trained tokenizer that can't be read.
  """
  try:
    return of_trained()
  except errors.UserError:
    if is_trained(model_dir):
      raise
    return vit_vqgan.ViTVQGANConfig()


def planned_params(model: vit_vqgan.ViTVQGANConfig):
  """Shapes and dtypes of a tokenizer's parameters, without any files."""
  return nn.meta.unbox(model_folder.abstract('tokenizer', model))


def load(model_dir, device: jax.Device | None = None):
  """The image tokenizer of a run, or of an exported model.

  Args:
    model_dir: the run's folder, or that of the model.
    device: where the parameters of a run are put; None for the first of this process. Those of a
      model are numpy arrays.

  Returns:
    Its ViTVQGANConfig, and its parameters; those of a run are from the newest checkpoint.

  Raises:
    UserError: if there is no finished checkpoint, or it is of another stage; or the model is
      unfinished or damaged.
  """
  if storage.exists(storage.join(model_dir, model_folder.CONFIG_FILE)):
    return tuple(model_folder.load_tokenizer(model_dir))
  path = checkpoints.latest_checkpoint(model_dir)
  model = vit_vqgan.ViTVQGANConfig(**checkpoints.read_config(path, 'tokenizer'))
  module = vit_vqgan.ViTVQGAN(model)
  return model, checkpoints.read_params(path, module, vit_vqgan.example_inputs(model), device)


def fingerprint(params) -> str:
  """Hexadecimal digest of what makes tokens, by which a token cache knows its tokenizer.

  The decoder is not part of it: trained further on its own, it draws the same tokens better.
  """
  digest = hashlib.sha256()
  makes_tokens = {name: params[name] for name in ('encoder', 'quantizer')}
  for path, leaf in jax.tree_util.tree_leaves_with_path(makes_tokens):
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
    with numerics.fixed():
      tokens = np.asarray(encode(np.resize(images, (batch_size,) + images.shape[1:])))
    yield from zip((caption for caption, _ in batch), tokens)
