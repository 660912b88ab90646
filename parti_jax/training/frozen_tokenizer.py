"""An image tokenizer that is trained and stays as it is: how it is loaded, and its tokens."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from parti_jax import errors
from parti_jax import fingerprints
from parti_jax import numerics
from parti_jax import storage
from parti_jax.models import vit_vqgan
from parti_jax.sampling import model_folder
from parti_jax.training import checkpoints


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenTokenizer:
  """A trained image tokenizer.

  Attributes:
    path: the folder that it is from.
    config: its sizes.
    params: its parameters, a tree of arrays.
    kept_fingerprint: the fingerprint that an exported model keeps, that of the run it is from;
      None where it has to be computed.
  """

  path: str
  config: vit_vqgan.ViTVQGANConfig
  params: Any
  kept_fingerprint: str | None = None

  @functools.cached_property
  def fingerprint(self) -> str:
    """By which token caches and models know the tokenizer, see `parti_jax.fingerprints`."""
    return self.kept_fingerprint or fingerprints.of_tokenizer(self.params)


def is_trained(path) -> bool:
  """Whether a folder is an exported model, or a run that has written a checkpoint."""
  return (storage.exists(storage.join(path, model_folder.CONFIG_FILE))
          or checkpoints.has_checkpoint(path))


def sizes(path, of_trained: Callable[[], vit_vqgan.ViTVQGANConfig]):
  """Sizes of a tokenizer that may have to be trained first, as for a plan.

  Args:
    path: its run's folder, or that of an exported model.
    of_trained: returns the sizes of the trained one.

  Returns:
    A ViTVQGANConfig: that of the trained tokenizer or, as long as there is none, that of gin.

  Raises:
    UserError: if there is a trained tokenizer that can't be read.
  """
  try:
    return of_trained()
  except errors.UserError:
    if is_trained(path):
      raise
    return vit_vqgan.ViTVQGANConfig()


def planned_params(model: vit_vqgan.ViTVQGANConfig):
  """Shapes and dtypes of a tokenizer's parameters, without any files."""
  return nn.meta.unbox(model_folder.abstract('tokenizer', model))


def load(path, device: jax.Device | None = None) -> FrozenTokenizer:
  """Loads the image tokenizer of a run, or of an exported model.

  Args:
    path: the run's folder, or that of the model.
    device: where the parameters of a run are put; None for the first of this process. Those of a
      model are numpy arrays.

  Returns:
    The tokenizer; that of a run is from the newest checkpoint.

  Raises:
    UserError: if there is no finished checkpoint, or it is of another stage; or the model is
      unfinished or damaged.
  """
  if storage.exists(storage.join(path, model_folder.CONFIG_FILE)):
    config, params, made_with = model_folder.load_tokenizer(path)
    return FrozenTokenizer(str(path), config, params, made_with.get('tokenizer'))
  checkpoint = checkpoints.latest_checkpoint(path)
  config = vit_vqgan.ViTVQGANConfig(**checkpoints.read_config(checkpoint, 'tokenizer'))
  params = checkpoints.read_params(
      checkpoint, vit_vqgan.ViTVQGAN(config), vit_vqgan.example_inputs(config), device)
  return FrozenTokenizer(str(path), config, params)


def load_for(key: str, path: str, remedy: str) -> FrozenTokenizer:
  """Loads a tokenizer that a gin value names, with numpy arrays.

  Args:
    key: the gin key, for messages.
    path: its value.
    remedy: what else the user may do than name another one, for messages.

  Raises:
    UserError: as `load`.
  """
  # In a thread of its own, which knows no mesh: the caller may be within a step's.
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    try:
      found = executor.submit(load, path).result()
    except errors.UserError as error:
      raise errors.UserError(f'{key}={path!r}: {error}; or {remedy}') from error
  return dataclasses.replace(found, params=jax.tree.map(np.asarray, found.params))


def tokenized(tokenizer: FrozenTokenizer, pictures: Iterator[tuple[str, np.ndarray]],
              batch_size: int) -> Iterator[tuple[str, np.ndarray]]:
  """Captions with image tokens, for captions with pictures.

  Args:
    tokenizer: makes the tokens.
    pictures: captions and pictures, uint8 [height, width, 3].
    batch_size: pictures at once, at most; a short last batch is padded.

  Yields:
    (caption, int32 [image_length]).
  """
  module = vit_vqgan.ViTVQGAN(tokenizer.config)
  encode = jax.jit(lambda images: module.apply(
      {'params': tokenizer.params}, images.astype(np.float32) / 255.0, method='tokenize'))
  size = None
  while batch := list(itertools.islice(pictures, batch_size)):
    size = size or len(batch)
    images = np.stack([picture for _, picture in batch])
    with numerics.fixed():
      tokens = np.asarray(encode(np.resize(images, (size,) + images.shape[1:])))
    yield from zip((caption for caption, _ in batch), tokens)
