"""Reads and writes a model folder: the configs, parameters and vocabulary of a released model.

```
config.json                   format version, network configs, sampling defaults, provenance
generator.safetensors         parameters of the text encoder and the image-token decoder
tokenizer.safetensors         parameters of the image tokenizer
vocabulary.model              SentencePiece vocabulary of the prompts
super_resolution.safetensors  parameters of the super-resolution network; optional
ranker.safetensors            parameters of the ranker; optional
ranker_vocabulary.model       text tokenizer of a ranker that has its own
```

NETWORKS lists the networks that a folder may have; config.json has the config of each under its
name. A folder may also hold one network alone (`save_part`). Version 1 of the format called the generator 'parti'. The metadata of a parameter file has
fingerprints (`parti_jax.core.fingerprints`) of the vocabulary and the tokenizer that its network was
trained with, so that files of two models are never mixed up.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree

from parti_jax.core import checks
from parti_jax.core import numerics
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import file_names
from parti_jax.exported_model import made_with as made_with_lib
from parti_jax.exported_model import model_config
from parti_jax.exported_model import network_shapes
from parti_jax.exported_model import parameter_files
from parti_jax.exported_model import preprocessing as preprocessing_lib
from parti_jax.exported_model import sampling_settings
from parti_jax.exported_model import target_folder
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.models import kinds as kinds_lib
from parti_jax.models import rankers
from parti_jax.models import text_encoders
from parti_jax.models import upscalers
from parti_jax.models.nn import layers

CONFIG_FILE = file_names.CONFIG_FILE
VOCABULARY_FILE = file_names.VOCABULARY_FILE
parameter_file = file_names.parameter_file
vocabulary_file = file_names.vocabulary_file
check_target = target_folder.check


class Network(NamedTuple):
  """A network that a model folder may hold.

  Attributes:
    kinds: the dataclasses of the network's configs by the names of their kinds in config.json.
      Without a name there, the first one is meant.
    module: makes the linen module from a config.
    example_inputs: makes example inputs of the module from a config.
    unnamed: the kind that config.json doesn't name, so that earlier versions read it; None if all
      are named.
  """

  kinds: Mapping[str, type]
  module: Callable[[Any], nn.Module]
  example_inputs: Callable[[Any], tuple]
  unnamed: str | None = None


def _network(known: kinds_lib.Kinds, unnamed: str | None = None) -> Network:
  """Returns a network of which there are several kinds."""
  return Network(
    known.configs,
    lambda config: known.of(config).module(config),
    lambda config: known.of(config).example_inputs(config),
    unnamed,
  )


# A model has all required networks, and the optional ones that were exported with it.
REQUIRED = {
  'generator': _network(generators.KINDS, unnamed='parti'),
  'tokenizer': _network(image_tokenizers.KINDS),
}
OPTIONAL = {
  'super_resolution': _network(upscalers.KINDS, unnamed='wdsr'),
  'ranker': _network(rankers.KINDS, unnamed='coca'),
}
# A network that a model has within its generator, and a folder of `save_part` has by itself.
ALONE = {'text_encoder': _network(text_encoders.KINDS)}
NETWORKS = REQUIRED | OPTIONAL | ALONE
# Their names in messages, where these are others.
_SHOWN = {'super_resolution': 'super-resolution network', 'text_encoder': 'text encoder'}

FILES = (CONFIG_FILE, *map(parameter_file, REQUIRED), VOCABULARY_FILE)
# Includes the files of models of version 1 of the format.
_ALL_FILES = (
  *FILES,
  *map(parameter_file, [*NETWORKS, 'parti']),
  *map(vocabulary_file, NETWORKS),
)
STORED_DTYPES = model_config.STORED_DTYPES


class Part(NamedTuple):
  """A network of a model.

  Attributes:
    config: its config.
    params: its parameters, in the form of `Model`'s.
    made_with: {kind: fingerprint} of the vocabulary and the tokenizer that it was trained with, if
      known; a tokenizer has its own fingerprint here.
    vocabulary_path: file of its own text tokenizer, for `text_tokenizer.open_tokenizer`; None if it
      uses the model's vocabulary.
    preprocessing: how pictures become its input; None for the way of the code that uses it.
    lower_case: whether texts become lower case before its own text tokenizer sees them.
  """

  config: Any
  params: Any
  made_with: dict[str, str] = {}
  vocabulary_path: pathlib.Path | None = None
  preprocessing: preprocessing_lib.Preprocessing | None = None
  lower_case: bool = False

  @property
  def inputs(self) -> model_config.Inputs:
    """How its inputs are made."""
    own = self.vocabulary_path is not None
    return model_config.Inputs(self.preprocessing, own, own and self.lower_case)


class LazyParts(Mapping[str, Part]):
  """Networks of a model, each of which is read when it is first used.

  Args:
    names: names of the networks.
    read: reads one.
  """

  def __init__(self, names: Iterable[str], read: Callable[[str], Part]):
    self._names, self._read = list(names), functools.cache(read)

  def __getitem__(self, name: str) -> Part:
    if name not in self._names:
      raise KeyError(name)
    return self._read(name)

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model folder in memory.

  Attributes:
    generator_config: config of the generator.
    tokenizer_config: config of the image tokenizer.
    generator_params: parameters of the generator, a tree of `parameter_files.StoredArray`, which are read
      when they are used.
    tokenizer_params: parameters of the tokenizer, a tree of StoredArray.
    vocabulary_path: path of the SentencePiece vocabulary.
    sampling: default sampling settings.
    provenance: JSON about the training, such as the data and the number of steps.
    stored_as: name of the dtype of the stored parameters.
    parts: the optional networks of the model, by their names in OPTIONAL; `load` makes each when it
      is first used.
    made_with: {name of a network: {kind: fingerprint}} for all networks, with `Part.made_with` of
      each.
  """

  generator_config: generators.Config
  tokenizer_config: image_tokenizers.Config
  generator_params: dict[str, Any]
  tokenizer_params: dict[str, Any]
  vocabulary_path: pathlib.Path
  sampling: sampling_settings.SamplingSettings
  provenance: dict[str, Any]
  stored_as: str
  parts: Mapping[str, Part]
  made_with: dict[str, dict[str, str]]

  @property
  def networks(self) -> dict[str, Part]:
    """All networks of the model by their names in NETWORKS."""
    required = {
      'generator': (self.generator_config, self.generator_params),
      'tokenizer': (self.tokenizer_config, self.tokenizer_params),
    }
    return {
      name: Part(*part, self.made_with.get(name, {})) for name, part in required.items()
    } | dict(self.parts)


def save(
  folder,
  *,
  generator_config: generators.Config,
  generator_params: PyTree,
  tokenizer_config: image_tokenizers.Config,
  tokenizer_params: PyTree,
  vocabulary_path,
  parts: dict[str, Part] | None = None,
  sampling: sampling_settings.SamplingSettings = sampling_settings.SamplingSettings(),  # noqa: B008
  provenance: dict[str, Any] | None = None,
  dtype: str = 'float16',
  overwrite: bool = False,
  made_with: Mapping[str, Mapping[str, str | None]] | None = None,
  sources: Mapping[str, str] | None = None,
  allow_mismatch: bool = False,
):
  """Writes a model folder atomically: it appears complete or not at all.

  Args:
    folder: the folder to create, a path or a URL. At a URL, config.json is uploaded last.
    generator_config: config of the generator.
    generator_params: parameters of the generator, with or without axis names.
    tokenizer_config: config of the image tokenizer.
    tokenizer_params: parameters of the tokenizer, with or without axis names.
    vocabulary_path: path of the SentencePiece vocabulary.
    parts: optional networks by their names in OPTIONAL, with or without axis names.
    sampling: default settings of `generate`.
    provenance: JSON about the model's origin, such as data and training steps.
    dtype: dtype in which to store the parameters, a name in STORED_DTYPES.
    overwrite: whether to replace an existing model; other files in its folder are kept.
    made_with: {name of a network: {kind: fingerprint}} of the vocabulary and the tokenizer that it
      was trained with, if known. A tokenizer's own fingerprint is by default computed from its
      parameters.
    sources: {name of a network: its origin}, for messages.
    allow_mismatch: whether to allow networks that were trained with another vocabulary or
      tokenizer than the model's; config.json then records it, and `load` warns about it.

  Returns:
    The folder, a pathlib.Path, or the unchanged URL.

  Raises:
    UserError: if the folder exists and may not be replaced, the parameters or the vocabulary don't
      fit the configs, a network was trained with another vocabulary or tokenizer, a ranker would see
      the pictures stretched, a parameter is too large for the dtype, or the folder can't be written.
  """
  folder = _checked(folder, overwrite, dtype)
  check_sizes(generator_config, tokenizer_config, 'the model to save')
  ranker = (parts or {}).get('ranker')
  if ranker is not None and ranker.preprocessing is None:
    rankers.check_shape(ranker.config, tokenizer_config.image_size)
  networks = {
    'generator': Part(generator_config, generator_params),
    'tokenizer': Part(tokenizer_config, tokenizer_params),
  } | (parts or {})
  known = made_with_lib.known(networks, made_with or {})
  mismatches = made_with_lib.mismatches(
    known, vocabulary_path, made_with_lib.own_vocabularies(networks), sources or {}
  )
  if mismatches and not allow_mismatch:
    raise UserError(mismatches[0])
  entries: dict[str, Any] = {
    'sampling': dataclasses.asdict(sampling),
    'provenance': provenance or {},
  }
  if mismatches:
    entries['mismatch_allowed'] = True
  return _write(folder, networks, known, entries, dtype, vocabulary_path)


def save_part(
  folder,
  name: str,
  part: Part,
  provenance: dict[str, Any],
  *,
  dtype: str = 'float32',
  overwrite: bool = False,
) -> pathlib.Path | str:
  """Writes a folder with one network alone, for `load_part`.

  Args:
    folder: as `save`.
    name: the network's name in NETWORKS.
    part: the network, with or without axis names.
    provenance: JSON about its origin, under keys that `part_provenance` returns.
    dtype: as `save`.
    overwrite: as `save`.

  Raises:
    UserError: as `save`.
  """
  folder = _checked(folder, overwrite, dtype, name)
  networks = {name: part}
  known = made_with_lib.known(networks, {name: part.made_with})
  return _write(folder, networks, known, {'provenance': provenance}, dtype)


def _checked(folder, overwrite: bool, dtype: str, part: str | None = None) -> pathlib.Path | str:
  """Returns the folder to write, a URL or a path, once it and the dtype are checked."""
  folder = checks.text('folder', folder)
  folder = folder if storage.is_url(folder) else pathlib.Path(folder)
  check_target(folder, overwrite, part)
  if dtype not in STORED_DTYPES:
    raise UserError(f'dtype={dtype!r} is not one of {", ".join(STORED_DTYPES)}')
  return folder


def _write(
  folder: pathlib.Path | str,
  networks: Mapping[str, Part],
  known: Mapping[str, dict[str, str]],
  entries: Mapping[str, Any],
  dtype: str,
  vocabulary_path=None,
) -> pathlib.Path | str:
  """Writes a folder with networks, their fingerprints, and further entries of config.json."""
  for name, part in networks.items():
    parameter_files.check(part.params, abstract(name, part.config), parameter_file(name))
  config = {
    'format_version': model_config.FORMAT_VERSION,
    **{
      name: model_config.entry(NETWORKS[name].kinds, part.config, NETWORKS[name].unnamed)
      for name, part in networks.items()
    },
    **{
      file_names.inputs_entry(name): entry
      for name, part in networks.items()
      if (entry := model_config.inputs_entry(part.inputs))
    },
    'parameters': {
      'stored_as': dtype,
      **{name: _count(part) for name, part in networks.items()},
    },
    **entries,
  }
  vocabularies = {} if vocabulary_path is None else {VOCABULARY_FILE: vocabulary_path}
  vocabularies |= {
    vocabulary_file(name): own for name, own in made_with_lib.own_vocabularies(networks).items()
  }
  with target_folder.filled(folder, _ALL_FILES) as temporary:
    for name, part in networks.items():
      path = temporary / parameter_file(name)
      parameter_files.write(path, part.params, dtype, known[name])
    for name, path in vocabularies.items():
      with storage.local_copy(path) as vocabulary:
        shutil.copyfile(vocabulary, temporary / name)
    text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
    (temporary / CONFIG_FILE).write_text(text, encoding='utf-8')
  return folder


def _count(part: Part) -> int:
  """Returns the number of parameters of a network."""
  return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(nn.meta.unbox(part.params)))


def load(folder) -> Model:
  """Reads a model folder.

  The networks compute in float32 on a CPU and in bfloat16 elsewhere, regardless of the dtype they
  were trained in. Those with a preprocessing of their own compute in float32 everywhere.

  Args:
    folder: a folder that `save` wrote, a path or a URL. The files at a URL are copied to a
      temporary folder that stays until the process ends.

  Raises:
    UserError: if the folder or one of its files is missing, unfinished, or has another format
      version, if a value in config.json is invalid, if parameters are missing, unknown or have
      other shapes than the configs imply (for a network in `Model.parts`, when it is first used), if
      the ranker would see the pictures stretched, or if a network was trained with another vocabulary
      or tokenizer.
  """
  folder = _local(folder, list(_ALL_FILES))
  _check_complete(folder, [CONFIG_FILE])
  where = folder / CONFIG_FILE
  config = model_config.read(where)
  if any(name in config for name in NETWORKS):  # Else it is damaged.
    _check_has(file_names.stored_name('generator', config), config, folder)
  optional = [
    name for name in OPTIONAL if name in config or (folder / parameter_file(name)).exists()
  ]
  stored = {name: file_names.stored_name(name, config) for name in [*REQUIRED, *optional]}
  paths = {name: folder / parameter_file(own) for name, own in stored.items()}
  inputs = {name: model_config.inputs(config, name, where) for name in optional}
  own_vocabularies = {
    name: folder / vocabulary_file(name) for name, own in inputs.items() if own.own_tokenizer
  }
  files = [*paths.values(), folder / VOCABULARY_FILE, *own_vocabularies.values()]
  _check_complete(folder, [path.name for path in files])
  sizes = {
    name: model_config.sizes(
      NETWORKS[name].kinds, config, own, _compute_dtype(inputs.get(name)), where
    )
    for name, own in stored.items()
  }
  check_sizes(sizes['generator'], sizes['tokenizer'], str(where))
  if 'ranker' in sizes and inputs['ranker'].preprocessing is None:
    try:
      rankers.check_shape(sizes['ranker'], sizes['tokenizer'].image_size)
    except UserError as error:
      raise UserError(f'{where}: {error}') from error
  sampling = model_config.sampling(config, where)
  provenance = model_config.provenance(config, where)
  stored_as = model_config.stored_as(config, where)
  made_with = {name: parameter_files.read_made_with(path) for name, path in paths.items()}
  vocabulary = folder / VOCABULARY_FILE
  allowed = model_config.mismatch_allowed(config, where)
  for line in made_with_lib.mismatches(made_with, vocabulary, own_vocabularies):
    if not allowed:
      raise UserError(f'{folder}: {line}')
    print(f'parti-jax: warning: {folder}: {line}', file=sys.stderr)

  def part(name: str) -> Part:
    own = sizes[name]
    return Part(
      own,
      parameter_files.read(paths[name], network_shapes.of(name, own, abstract)),
      made_with[name],
      own_vocabularies.get(name),
      inputs[name].preprocessing if name in inputs else None,
      name in inputs and inputs[name].lower_case,
    )

  generator, tokenizer = map(part, REQUIRED)
  return Model(
    generator.config,
    tokenizer.config,
    generator.params,
    tokenizer.params,
    vocabulary,
    sampling,
    provenance,
    stored_as,
    LazyParts(optional, part),
    made_with,
  )


def load_part(name: str, folder) -> Part:
  """Reads only one network of a model folder, or of a folder that `save_part` wrote.

  Args:
    name: the network's name in NETWORKS.
    folder: a path or a URL, as `load`.

  Raises:
    UserError: as `load`, and if the folder doesn't have the network.
  """
  vocabulary = vocabulary_file(name)
  older = [parameter_file('parti')] if name == 'generator' else []
  folder = _local(folder, [CONFIG_FILE, parameter_file(name), vocabulary, *older])
  _check_complete(folder, [CONFIG_FILE])
  where = folder / CONFIG_FILE
  config = model_config.read(where)
  stored = file_names.stored_name(name, config)
  _check_has(stored, config, folder)
  _check_complete(folder, [parameter_file(stored)])
  inputs = model_config.inputs(config, name, where)
  dtype = _compute_dtype(inputs)
  sizes = model_config.sizes(NETWORKS[name].kinds, config, stored, dtype, where)
  file = folder / parameter_file(stored)
  made_with = parameter_files.read_made_with(file)
  path = folder / vocabulary if inputs.own_tokenizer else None
  if path is not None:
    _check_complete(folder, [vocabulary])
    for line in made_with_lib.other_vocabulary(f'the {name} {folder}', made_with, path):
      raise UserError(line)
  params = parameter_files.read(file, network_shapes.of(name, sizes, abstract))
  return Part(sizes, params, made_with, path, inputs.preprocessing, inputs.lower_case)


def part_config(name: str, folder) -> Any:
  """Returns the config of one network of a folder; arguments and errors are those of `load_part`."""
  folder = _local(folder, [CONFIG_FILE])
  _check_complete(folder, [CONFIG_FILE])
  where = folder / CONFIG_FILE
  config = model_config.read(where)
  stored = file_names.stored_name(name, config)
  _check_has(stored, config, folder)
  return model_config.sizes(NETWORKS[name].kinds, config, stored, _compute_dtype(), where)


def _check_has(name: str, config: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Raises UserError unless a folder with this config.json has a network."""
  if name in config or (folder / parameter_file(name)).exists():
    return
  shown = lambda network: _SHOWN.get(network, network)
  present = ' and '.join(f'a {shown(network)}' for network in NETWORKS if network in config)
  raise UserError(
    f'the folder {folder} has no {shown(name)}'
    f'{f", only {present}" if present else ""}; give one that has'
  )


def load_ranker(folder) -> Part:
  """Reads a ranker to use without the model that it is in, so that it needs a text tokenizer.

  Args:
    folder: a path or a URL: a folder that `parti-jax import ranker` wrote, or a model folder.

  Returns:
    The ranker. Its text tokenizer is its own or the model's.

  Raises:
    UserError: as `load_part`, and if there is no text tokenizer.
  """
  wanted = [CONFIG_FILE, parameter_file('ranker'), vocabulary_file('ranker'), VOCABULARY_FILE]
  folder = _local(folder, wanted)
  part = load_part('ranker', folder)
  if part.vocabulary_path is not None:
    return part
  _check_complete(folder, [VOCABULARY_FILE])
  shared = folder / VOCABULARY_FILE
  for line in made_with_lib.other_vocabulary(f'the ranker {folder}', part.made_with, shared):
    raise UserError(line)
  return part._replace(vocabulary_path=shared)


def part_provenance(name: str, folder) -> dict[str, Any]:
  """Returns what config.json says about the origin of a network in a folder."""
  where = _local(folder, [CONFIG_FILE]) / CONFIG_FILE
  return provenance_of(name, model_config.provenance(model_config.read(where), where))


def provenance_of(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the entries about a network in what config.json says about origins."""
  return {key: value for key, value in found.items() if key == name or key.startswith(f'{name}_')}


def _local(folder, names: list[str]) -> pathlib.Path:
  """Returns the folder; for a URL, a local copy with the files in `names`."""
  folder = checks.text('folder', folder)
  if storage.is_url(folder):
    if CONFIG_FILE not in storage.names(folder):
      raise UserError(f"{folder} isn't a model folder: it has no {CONFIG_FILE}")
    folder = storage.local_folder(folder, names)
  return pathlib.Path(folder)


def _compute_dtype(inputs: model_config.Inputs | None = None) -> str:
  """Returns the dtype to compute in; published scores are compared to their last digits."""
  exact = inputs is not None and inputs.preprocessing is not None
  return 'float32' if exact or jax.default_backend() == 'cpu' else 'bfloat16'


@functools.cache
@numerics.fixed()
def abstract(name: str, config: Any) -> PyTree:
  """Returns abstract parameters of a network with their logical axis names; computes nothing.

  Args:
    name: the network's name in NETWORKS.
    config: the network's config.
  """
  network = NETWORKS[name]
  rng = jax.eval_shape(lambda: jax.random.key(0))
  inputs = jax.eval_shape(lambda: network.example_inputs(config))
  with layers.only_shapes():
    return jax.eval_shape(network.module(config).init, rng, *inputs)['params']


def _check_complete(folder: pathlib.Path, files: Iterable[str]):
  """Raises UserError unless the folder and these files exist."""
  if not folder.is_dir():
    raise UserError(f'the model folder {folder} does not exist')
  if not any((folder / name).is_file() for name in _ALL_FILES):
    run = ', but the checkpoints of a run; `parti-jax export` makes a model folder of runs'
    raise UserError(
      f"{folder} isn't a model folder: it has none of {', '.join(FILES)}"
      f'{run if (folder / "checkpoints").is_dir() else ""}'
    )
  missing = [name for name in files if not (folder / name).is_file()]
  if missing:
    raise UserError(
      f'the model folder {folder} is unfinished: {", ".join(missing)} missing; '
      'export or download the model again'
    )


def check_sizes(generator: generators.Config, tokenizer: image_tokenizers.Config, where: str):
  """Raises UserError unless the generator's codebook size and grid match the tokenizer's."""
  for name in ('codebook_size', 'grid'):
    ours, theirs = getattr(generator, name), getattr(tokenizer, name)
    if ours != theirs:
      raise UserError(
        f"{where}: the generator's {name} is {ours}, but the tokenizer's is {theirs}; "
        'the generator was trained on the tokens of another tokenizer'
      )
