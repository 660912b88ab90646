"""Finds and reads the checkpoints of runs, and checks that they fit a model.

A checkpoint has the items `state`, `data` (the position in the data) and `model`, written by
`checkpoint_manager`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from etils import epath

from parti_jax.checkpoints import remote_staging
from parti_jax.checkpoints import store_arrays
from parti_jax.checkpoints import verification
from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import numerics
from parti_jax.core import storage
from parti_jax.exported_model import model_folder
from parti_jax.models import config_checks
from parti_jax.models import generators
from parti_jax.models import kinds as kinds_lib
from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.partitioning import placing

# The part of the parameters that has adapters (`parti_jax.models.lora`), in the checkpoints of a run that
# trains them. The parameters of their base are not in the checkpoints.
ADAPTERS = 'adapters'
# Files of a checkpoint that Orbax reads as JSON.
_METADATA_FILES = (
  '_CHECKPOINT_METADATA',
  'model/metadata',
  'data/metadata',
  'state/_METADATA',
  'state/_sharding',
  'state/array_metadatas/process_0',
)


def describe(objective) -> dict:
  """Returns an objective's name and its model's config, in the form that checkpoints store.

  If it trains adapters, this also says which, and where their base was.
  """
  adapters = {} if objective.lora is None else {'lora': objective.lora}
  return description(objective.name, objective.model) | adapters


def description(name: str, config) -> dict:
  """Returns the name of an objective and the config of its model, in that form.

  The kind of the model is named unless it is the first, which it is in checkpoints of older
  versions.
  """
  kind = config_checks.kind_name(_kinds(name), config)
  named = {} if kind in (None, _first_kind(name)) else {'kind': kind}
  return {'stage': name, **named, 'config': parti_config.as_dict(config)}


def _kinds(name: str) -> Mapping[str, type]:
  """Returns the configs of the kinds of a network; {} if models don't have this network."""
  network = model_folder.NETWORKS.get(name)
  return network.kinds if network else {}


def _first_kind(name: str) -> str | None:
  return next(iter(_kinds(name)), None)


def folder(model_dir) -> epath.Path:
  """Returns the folder of a run's checkpoints, as the absolute path or URL that Orbax needs."""
  path = storage.as_epath(model_dir)
  if storage.is_url(model_dir):
    store_arrays.configure()
  return (path if storage.is_url(model_dir) else path.absolute()) / 'checkpoints'


def has_checkpoint(model_dir) -> bool:
  """Returns whether a run has written a whole checkpoint."""
  if remote_staging.is_needed(model_dir):
    return bool(remote_staging.steps(model_dir))
  directory = folder(model_dir)
  return directory.is_dir() and bool(ocp.utils.checkpoint_steps(directory))


def latest_checkpoint(model_dir) -> epath.Path:
  """Returns the folder of a run's newest whole checkpoint; warns if newer ones are damaged.

  It reads all files of the checkpoint, and changes nothing, since the run may still be training.
  From a store that Orbax can't read, it copies the checkpoint to a temporary folder that stays
  until the process ends.

  Raises:
    UserError: if the run's folder is missing or holds no whole checkpoint.
  """
  if remote_staging.is_needed(model_dir):
    exists, directory = storage.is_folder(model_dir), remote_staging.Staging(model_dir).directory
  else:
    directory = folder(model_dir)
    exists = directory.is_dir()
  if not exists:
    raise errors.UserError(
      f'{model_dir}: no training run there (no folder {directory.name}); give the --model_dir '
      'of a run'
    )
  found = verification.newest_whole(directory)
  if found.step is None:
    raise errors.UserError(
      f'{model_dir}: holds no finished checkpoint yet; train until the '
      'first one is written (train.checkpoint_every)'
    )
  for bad in found.damaged:
    print(
      f'parti-jax: warning: {model_dir}: checkpoint {bad.step} is damaged: {bad.fault}; '
      f'taking {found.step}',
      file=sys.stderr,
    )
  return directory / str(found.step)


def checkpoint_of(model_dir, step: int) -> epath.Path:
  """Returns the folder of a run's checkpoint of a step, after reading all its files.

  Raises:
    UserError: if it doesn't exist, is damaged, or is in a store that Orbax can't read.
  """
  if remote_staging.is_needed(model_dir):
    raise errors.UserError(
      f'{model_dir}: only the newest checkpoint there can be read; copy the '
      'folder to a disk for an older one'
    )
  path = folder(model_dir) / str(step)
  if not path.is_dir():
    steps = sorted(ocp.utils.checkpoint_steps(path.parent)) if path.parent.is_dir() else []
    existing = f'there are {", ".join(map(str, steps))}' if steps else 'there are none'
    raise errors.UserError(f'{model_dir}: no checkpoint of step {step}; {existing}')
  found = verification.fault(path)
  if found:
    raise errors.UserError(f'{model_dir}: checkpoint {step} is damaged: {found}; take another')
  return path


def read_model(path: epath.Path) -> dict:
  """Returns the description of a checkpoint's model: the dict that `describe` returned.

  Raises:
    UserError: if the checkpoint is unfinished, isn't from this package, or has metadata of an
      implausible size.
  """
  for file in _METADATA_FILES:
    if (path / file).exists():
      storage.check_size(path / file, storage.MAX_JSON)
  try:
    with _json_alone() as checkpointer:
      return checkpointer.restore(path / 'model')
  except (FileNotFoundError, ValueError, KeyError) as error:
    raise _unfinished(path) from error


def read_metadata(path: epath.Path):
  """Returns shapes and dtypes of a tree that Orbax wrote; None if the metadata is missing.

  Args:
    path: folder of the tree, such as `state` in a checkpoint.
  """
  try:
    # Not by a Checkpointer, which warns that a part of a checkpoint has no metadata as a whole.
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=verification.alone())
    return handler.metadata(path).tree
  except (FileNotFoundError, ValueError, KeyError):
    return None


def read_place(path: epath.Path) -> dict:
  """Returns a checkpoint's position in the data, a result of `SharedBatches.state`."""
  with _json_alone() as checkpointer:
    return checkpointer.restore(path / 'data')


def _json_alone() -> ocp.Checkpointer:
  return ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=verification.alone())


def read_config(path: epath.Path, objective: str) -> Any:
  """Returns the config of a checkpoint's model, which is one of `model_folder.NETWORKS`.

  Args:
    path: a checkpoint's folder, the result of `latest_checkpoint`.
    objective: name of the objective that the checkpoint must have.

  Raises:
    UserError: if the checkpoint is unfinished or of another objective, if its kind of model is
      unknown, or if its config has other fields.
  """
  model = read_model(path)
  if model['stage'] != objective:
    raise errors.UserError(
      f'{path}: a checkpoint of the objective {model["stage"]!r}; give a run of {objective!r}'
    )
  kinds, sizes = _kinds(objective), model['config']
  kind = str(model.get('kind', _first_kind(objective)))
  if kind not in kinds:
    raise errors.UserError(
      f'{path}: the {objective} is of the kind {checks.shown(kind)}, which is not one of '
      f'{", ".join(kinds)}{kinds_lib.remedy(kinds)}'
    )
  sizes = generators.upgrade(kinds[kind], sizes)
  if unknown := ', '.join(sorted(sizes.keys() - checks.field_types(kinds[kind]).keys())):
    raise errors.UserError(
      f'{path}: its config has fields that {kinds[kind].__name__} does not have: {unknown}'
    )
  types = checks.field_types(kinds[kind])
  return kinds[kind](  # JSON has lists for tuples.
    **{
      name: checks.typed(f'{path}: {kinds[kind].__name__}.{name}', value, types[name])
      for name, value in sizes.items()
    }
  )


@numerics.fixed()
def read_params(path: epath.Path, module, inputs, device: jax.Device | None = None):
  """Reads a checkpoint's parameters of a module onto one device, like `read_parts`.

  Args:
    path: a checkpoint's folder, the result of `latest_checkpoint`.
    module: the linen module of the parameters.
    inputs: example inputs of the module, a sequence of arrays.
    device: the device; None for the first one of this process.
  """
  with layers.only_shapes():
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
  sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
  return read_parts(
    path,
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      nn.meta.unbox(boxed),
    ),
  )


def read_parts(path: epath.Path, params):
  """Reads parts of a checkpoint's parameters, without the optimizer's state.

  If the run kept an average of the parameters (`state.averaged`), this returns the average. Other
  parts that were trained, such as a discriminator, are left out. Each process reads the shards of
  its own devices without waiting for the others, so a single process may call it.

  Args:
    path: a checkpoint's folder, the result of `latest_checkpoint`.
    params: {name of a part: a tree of shapes and shardings}.

  Returns:
    The parameters, with these shardings.

  Raises:
    UserError: if parameters are missing, unknown or of another shape.
  """
  saved = saved_shapes(path)
  if ADAPTERS not in params and any(name.startswith(f'params/{ADAPTERS}/') for name in saved):
    raise errors.UserError(
      f'{path} has adapters of a network (LoRA), not the network; `parti-jax export` adds them to '
      'their base: give the model folder that it writes'
    )
  averaged = _averaged(saved, params)
  abstract = {
    'params': {part: tree for part, tree in params.items() if part not in averaged},
    'statistics': {'average': {part: params[part] for part in averaged}},
  }
  abstract = {kind: tree for kind, tree in abstract.items() if jax.tree.leaves(tree)}
  check_same_shapes(
    path,
    abstract,
    within=tuple(
      f'statistics/average/{part}/' if part in averaged else f'params/{part}/' for part in params
    ),
  )
  options = verification.alone()
  with ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options
  ) as checkpointer:
    restored = checkpointer.restore(
      path / 'state',
      args=ocp.args.PyTreeRestore(
        item=abstract,
        partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
      ),
    )
  return restored.get('params', {}) | restored.get('statistics', {}).get('average', {})


def averaged_parts(path: epath.Path, params: Iterable[str]) -> set[str]:
  """Returns the parts that `read_parts` reads as averages, among those named `params`."""
  return _averaged(saved_shapes(path), params)


def _averaged(saved: Iterable[str], parts: Iterable[str]) -> set[str]:
  return {
    part for part in parts if any(name.startswith(f'statistics/average/{part}/') for name in saved)
  }


def read_model_folder(path, objective, abstract, inputs):
  """Reads the parameters of an exported model, to start a run from.

  Args:
    path: a model folder written by `parti-jax export`, or a folder with the network alone, such as
      `parti-jax import` writes.
    objective: the run's objective; its model must have the same config.
    abstract: the parameters' shapes and shardings.
    inputs: the run's vocabulary and tokenizer, an `Inputs`.

  Returns:
    The parameters, on the mesh.

  Raises:
    UserError: if the model folder doesn't exist, or its config, vocabulary or tokenizer differs;
      names the differences.
  """
  if objective.lora is not None:
    raise errors.UserError(
      f'train.initial_model={str(path)!r}: adapters start from LoraObjective.base; set it, and '
      'train.initial_model to None'
    )
  key = f'train.initial_model={str(path)!r}'
  part = read_network(objective.name, path, key)
  inputs.check(key, part.made_with, 'or start without train.initial_model')
  check_same_model(path, description(objective.name, part.config), describe(objective))
  return put_like(part.params, {name: abstract[name] for name in part.params})


def read_network(name: str, folder, key: str) -> model_folder.Part:
  """Reads a network that a run starts with.

  Args:
    name: the network's name in `model_folder.NETWORKS`.
    folder: a model folder, or a folder with the network alone, as a path or a URL.
    key: the gin key and its value, for messages.

  Raises:
    UserError: if the folder doesn't exist, is damaged, or has no such network.
  """
  try:
    if not storage.exists(storage.join(folder, model_folder.VOCABULARY_FILE)):
      return model_folder.load_part(name, folder)
    networks = model_folder.load(folder).networks
  except errors.UserError as error:
    raise errors.UserError(f'{key}: {error}') from error
  if name not in networks:
    raise errors.UserError(
      f'{key}: the model has no {name} to start from, only {", ".join(networks)}; give another folder, '
      'or None'
    )
  return networks[name]


def put_like(params, abstract):
  """Returns parameters with the dtypes and shardings of `abstract`."""
  return jax.tree.map(
    lambda leaf, like: placing.put(leaf.astype(like.dtype), like.sharding), params, abstract
  )


def check_same_model(path, saved: dict, wanted: dict):
  """Raises UserError, naming the settings, if two models differ."""
  if saved['stage'] != wanted['stage']:
    raise errors.UserError(
      f'{path}: a checkpoint of the objective {saved["stage"]!r}, not of '
      f'{wanted["stage"]!r}; choose another --model_dir'
    )
  _check_same_adapters(path, saved.get('lora'), wanted.get('lora'))
  kinds = [model.get('kind', _first_kind(model['stage'])) for model in (saved, wanted)]
  if kinds[0] != kinds[1]:
    raise errors.UserError(
      f'{path}: a {saved["stage"]} of the kind {kinds[0]}, not of {kinds[1]}; train in another '
      '--model_dir, or restore the model settings'
    )
  # Stages without kinds, such as the text encoder's, have Parti's config.
  of_kind = _kinds(wanted['stage']).get(str(kinds[1]), parti_config.PartiConfig)
  saved_config = generators.upgrade(of_kind, saved['config'])

  def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {
        key: plain(part) for key, part in value.items() if key not in config_checks.FREE_SETTINGS
      }
    return list(value) if isinstance(value, (tuple, list)) else value

  def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = ''
  ) -> list[str]:
    found = []
    for key, value in ours.items():
      other = theirs.get(key)
      if key in config_checks.FREE_SETTINGS or plain(other) == plain(value):
        continue
      if isinstance(value, Mapping) and isinstance(other, Mapping) and value.keys() == other.keys():
        found += differences(other, value, f'{prefix}{key}.')
      else:
        found.append(f'{prefix}{key} is {other} there and {value} here')
    return found

  differing = differences(saved_config, wanted['config'])
  if differing:
    raise errors.UserError(
      f'{path}: has another configuration: {"; ".join(differing)}; train in '
      'another --model_dir, or restore the model settings'
    )


def _check_same_adapters(
  path, saved: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None
) -> None:
  """Raises UserError if two models differ in what `describe` says about adapters."""
  if (saved is None) != (wanted is None):
    has, has_not = ('adapters (LoRA)', 'a network') if wanted is None else ('a network', 'adapters')
    raise errors.UserError(
      f'{path}: a checkpoint of {has}, but the run trains {has_not}; train in another --model_dir, '
      'or restore train.objective'
    )
  if saved is None or wanted is None:
    return
  for name in ('rank', 'alpha', 'targets'):
    theirs, ours = (
      tuple(value) if isinstance(value, list) else value
      for value in (saved.get(name), wanted.get(name))
    )
    if theirs != ours:
      raise errors.UserError(
        f'{path}: has another configuration: LoraObjective.{name} is {theirs} there and {ours} here; '
        'train in another --model_dir, or restore it'
      )


def check_same_shapes(path, abstract, within: str | tuple[str, ...] = ''):
  """Compares the shapes of a checkpoint's arrays with the expected ones.

  Args:
    path: the checkpoint's folder.
    abstract: a tree of shapes.
    within: prefix, or prefixes, of the part of the state that `abstract` covers, such as
      'params/encoder/'; all of the state by default.

  Raises:
    UserError: if the checkpoint is unfinished, or if arrays are missing, unknown or of another
      shape; names them.
  """
  saved, wanted = saved_shapes(path), _shapes(abstract)
  differing = [
    f'{name} {saved.get(name, "missing")} instead of {shape}'
    for name, shape in wanted.items()
    if saved.get(name) != shape
  ]
  differing += [
    f'{name} {shape} is not in this configuration'
    for name, shape in saved.items()
    if name.startswith(within) and name not in wanted
  ]
  if differing:
    more = f' and {len(differing) - 5} more' if len(differing) > 5 else ''
    of_average = all(line.startswith('statistics/average/') for line in differing)
    settings = "the objective's ema" if of_average else 'the settings of the model or the optimizer'
    raise errors.UserError(
      f'{path}: does not fit this configuration: '
      f'{"; ".join(differing[:5])}{more}; train in another --model_dir, or restore {settings}'
    )


def by_path(tree) -> dict[str, Any]:
  """Returns {path: array} of a tree of arrays or abstract arrays, with the paths of checkpoints.

  A path joins the names of dict keys, fields and indices with '/'. Empty nodes have no path.
  """
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def saved_shapes(path) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the arrays of a checkpoint's state, by their paths."""
  metadata = read_metadata(path / 'state')
  if metadata is None:
    raise _unfinished(path)
  return _shapes(metadata)


def _unfinished(path) -> errors.UserError:
  return errors.UserError(
    f'{path}: not a finished checkpoint of this package; remove the folder or choose another one'
  )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}
