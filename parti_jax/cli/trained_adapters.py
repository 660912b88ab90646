"""Adapters (LoRA) in the checkpoint of a run, and the base that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.exported_model import adapters as adapters_lib
from parti_jax.exported_model import model_folder
from parti_jax.models import lora


def read(name: str, path: Any, described: Mapping[str, Any]) -> adapters_lib.Adapters:
  """Reads the adapters of a checkpoint.

  Args:
    name: the network's name in `model_folder.NETWORKS`.
    path: the checkpoint's folder, the result of `run_checkpoints.latest_checkpoint`.
    described: the result of `run_checkpoints.read_model`, which says something under 'lora'.

  Raises:
    UserError: if the checkpoint is of another network, or damaged.
  """
  config = run_checkpoints.read_config(path, name)
  settings = lora.Settings(
    described['lora']['rank'], described['lora']['alpha'], tuple(described['lora']['targets'])
  )
  prefix = f'params/{run_checkpoints.ADAPTERS}/'
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = {
    saved.removeprefix(prefix): jax.ShapeDtypeStruct(shape, 'float32', sharding=sharding)
    for saved, shape in run_checkpoints.saved_shapes(path).items()
    if saved.startswith(prefix)
  }
  if not abstract:
    raise errors.UserError(f'{path} has no adapters, since its run had LoraObjective.rank=0')
  tree = {run_checkpoints.ADAPTERS: flax.traverse_util.unflatten_dict(abstract, sep='/')}
  params = run_checkpoints.read_parts(path, tree)[run_checkpoints.ADAPTERS]
  base = run_checkpoints.read_place(path).get(fingerprints.BASE)
  if not base:
    raise errors.UserError(
      f'{path} does not say which base its adapters belong to; train them again'
    )
  found = adapters_lib.Adapters(name, settings, params, base, int(path.name))
  adapters_lib.check(found, adapters_lib.projections(name, config), str(path))
  return found


def base_of(
  found: adapters_lib.Adapters, run: str, recorded: str, given: model_folder.Model | None
) -> tuple[model_folder.Part, dict[str, Any]]:
  """Finds the base of adapters, by its fingerprint.

  Args:
    found: the adapters.
    run: the flag with their run, for messages.
    recorded: the folder that the run had as LoraObjective.base.
    given: the model of --base, which is tried first; None without one.

  Returns:
    The network, and what its folder says about its origin.

  Raises:
    UserError: if neither is the base.
  """
  name = found.network
  if given is not None and name in given.networks:
    part = given.networks[name]
    if fingerprints.of_parameters(part.params) == found.base:
      return part, model_folder.provenance_of(name, given.provenance)
  way_out = f'give --base, the model folder whose {name} has the fingerprint {found.base}'
  try:
    part = run_checkpoints.read_network(name, recorded, 'LoraObjective.base')
  except errors.UserError as error:
    raise errors.UserError(
      f'{run}: the base of its adapters is not there ({error}); {way_out}'
    ) from error
  other = fingerprints.of_parameters(part.params)
  if other != found.base:
    raise errors.UserError(
      f'{run}: its adapters belong to the base {found.base}, but {recorded} has {other} by now; {way_out}'
    )
  return part, model_folder.part_provenance(name, recorded)
