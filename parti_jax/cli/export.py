"""`parti-jax export`: writes the trained parts to one model folder, for sampling."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import sampling_flags
from parti_jax.cli import trained_adapters
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core import texts
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import adapters as adapters_lib
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import image_tokenizers

_RUNS = {
  'tokenizer': "the tokenizer's run, the --model_dir that it was trained in, or a folder with a "
  'tokenizer, such as `parti-jax import` writes',
  'generator': "the generator's run, its --model_dir, or a folder with a generator",
  **{
    name: f'the {name.replace("_", "-")} run, its --model_dir, or a folder with such a network; '
    'optional'
    for name in model_folder.OPTIONAL
  },
}
# The vocabulary and tokenizer that a network depends on.
_NEEDED = {'generator': ('vocabulary', 'tokenizer'), 'ranker': ('vocabulary',)}


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax export`."""
  for name, text in _RUNS.items():
    parser.add_argument(f'--{name}', metavar='RUN', help=text)
  parser.add_argument(
    '--vocabulary',
    metavar='PATH',
    help='the text tokenizer of the captions: a SentencePiece model, a tokenizer.json, or the folder '
    'of the imported text encoder that the generator has',
  )
  parser.add_argument(
    '--base',
    metavar='FOLDER',
    help='a model folder with all parts that no other flag gives, to add or replace a part',
  )
  parser.add_argument('--output_dir', required=True, help='the model folder to write')
  parser.add_argument(
    '--merge',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='add adapters of a run of LoraObjective to their base (default), or write the adapters alone '
    'to --output_dir, as NETWORK_lora.safetensors for `generate --lora`',
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace an existing model folder there'
  )
  parser.add_argument(
    '--dtype',
    choices=sorted(model_folder.STORED_DTYPES),
    help="dtype of the stored parameters (default: the base's, or float16)",
  )
  parser.add_argument(
    '--allow_mismatch',
    action='store_true',
    help='export networks that were trained with another vocabulary or tokenizer '
    'than the given ones',
  )
  group = parser.add_argument_group('sampling', 'Default sampling settings of the model.')
  sampling_flags.add_arguments(group, "the base's, or plain sampling")


def run(args: argparse.Namespace) -> int:
  """Writes the model folder, or files of adapters; returns the exit status."""
  if not args.merge:
    return _write_adapters(args)
  _check_flags(args)
  base = model_folder.load(args.base) if args.base else None
  sampling = (base.sampling if base else sampling_settings.SamplingSettings()).replace(
    **sampling_flags.given(args)
  )
  parts = dict(base.networks) if base else {}
  provenance = dict(base.provenance) if base else {}
  for name in _RUNS:
    if getattr(args, name):
      parts[name] = _part(name, getattr(args, name), provenance, base)
  made_with = {name: part.made_with for name, part in parts.items()}
  if base:
    made_with |= _made_with_base(base, [name for name in parts if not getattr(args, name)])
  vocabulary: str | pathlib.Path | None = base.vocabulary_path if base else None
  if args.vocabulary:
    vocabulary = _vocabulary(args.vocabulary)
    provenance |= _text_encoder_origin(args.vocabulary, made_with['generator'])
  generator, tokenizer = (parts.pop(name) for name in model_folder.REQUIRED)
  dtype = args.dtype or (base.stored_as if base else 'float16')
  folder = model_folder.save(
    args.output_dir,
    generator_config=generator.config,
    generator_params=generator.params,
    tokenizer_config=tokenizer.config,
    tokenizer_params=tokenizer.params,
    parts=parts,
    vocabulary_path=vocabulary,
    sampling=sampling,
    dtype=dtype,
    overwrite=args.overwrite,
    provenance=provenance,
    made_with=made_with,
    allow_mismatch=args.allow_mismatch,
    sources={name: getattr(args, name) or args.base for name in made_with},
  )
  given = [name for name in _RUNS if getattr(args, name)]
  if dtype != 'float32' and any(f'{name}_lora' in provenance for name in given):
    print(f'kernels with their adapters are rounded to {dtype}; --dtype=float32 keeps them')
  size = sum(storage.sizes(folder).values())
  print(f'{folder}: {size / 1e6:.1f} MB; try it: parti-jax generate PROMPT --model={folder}')
  return 0


def _check_flags(args: argparse.Namespace):
  """Raises UserError for missing flags, and if the vocabulary doesn't exist."""
  flags = {name: getattr(args, name) for name in model_folder.REQUIRED}
  flags['vocabulary'] = args.vocabulary
  missing = [f'--{flag}' for flag, value in flags.items() if value is None]
  if missing and not args.base:
    raise errors.UserError(
      f'{", ".join(missing)}: required for a new model folder; or give --base, '
      'a model folder that has the rest'
    )
  if args.vocabulary and not storage.exists(args.vocabulary):
    raise errors.UserError(
      f'--vocabulary={args.vocabulary}: file not found; `parti-jax vocabulary` makes one'
    )


def _vocabulary(path: str) -> str:
  """Returns the file of a text tokenizer, which may be given by a folder.

  Raises:
    UserError: if the folder has none.
  """
  if not storage.is_folder(path):
    return path
  names = (model_folder.vocabulary_file('text_encoder'), model_folder.VOCABULARY_FILE)
  for name in names:
    if storage.exists(found := storage.join(path, name)):
      return found
  raise errors.UserError(
    f'--vocabulary={path}: the folder has none of {", ".join(names)}; give the file of the text '
    'tokenizer, or the folder of an imported text encoder'
  )


def _text_encoder_origin(folder: str, made_with: Mapping[str, str]) -> dict[str, Any]:
  """Returns the origin of the generator's text encoder, if this is the folder that it came from."""
  if not storage.exists(storage.join(folder, model_folder.CONFIG_FILE)):
    return {}
  origin = model_folder.part_provenance('text_encoder', folder)
  found = fingerprints.of_origin(origin.get('text_encoder'))
  return origin if found and found == made_with.get('text_encoder') else {}


def _write_adapters(args: argparse.Namespace) -> int:
  """Writes the adapters of runs of LoraObjective to files; returns the exit status."""
  found = {}
  unused = [flag for flag in ('vocabulary', 'dtype', 'allow_mismatch') if getattr(args, flag)]
  if unused := [*unused, *sampling_flags.overriding(args)]:
    raise errors.UserError(
      f'--no-merge writes adapters alone, in float32, and takes no --{", no --".join(unused)}; leave '
      'it out'
    )
  if not storage.is_url(args.output_dir) and os.path.isfile(args.output_dir):
    raise errors.UserError(f'--output_dir={args.output_dir} is a file; choose a folder')
  for name in _RUNS:
    if not (run := getattr(args, name)):
      continue
    path = None
    if not storage.exists(storage.join(run, model_folder.CONFIG_FILE)):
      path = run_checkpoints.latest_checkpoint(run)
    described = {} if path is None else run_checkpoints.read_model(path)
    if 'lora' not in described:
      raise errors.UserError(
        f'--{name}={run} has no adapters; --no-merge takes runs of LoraObjective only'
      )
    file = storage.join(args.output_dir, f'{name}_lora.safetensors')
    if storage.exists(file) and not args.overwrite:
      raise errors.UserError(f'{file} exists; choose another --output_dir, or give --overwrite')
    found[file] = trained_adapters.read(name, path, described)
  if not found:
    raise errors.UserError('--no-merge: give a run of LoraObjective, such as --generator=RUN')
  for file, adapters in found.items():
    adapters_lib.write(file, adapters)
    count = texts.short_count(adapters_lib.count(adapters.params))
    print(
      f'{file}: {count} parameters of rank {adapters.settings.rank}, {storage.size(file) / 1e6:.2f} MB, '
      f'for the base {adapters.base}'
    )
  return 0


def _part(
  name: str, folder, provenance: dict[str, Any], base: model_folder.Model | None
) -> model_folder.Part:
  """Reads a network of a run, or of a folder that `save` or `save_part` wrote; notes its origin."""
  if storage.exists(storage.join(folder, model_folder.CONFIG_FILE)):
    part, origin = _of_folder(name, folder), model_folder.part_provenance(name, folder)
  else:
    part, origin = _trained(name, folder, base)
  # Of the base's network, which this one replaces.
  for key in (name, f'{name}_steps', f'{name}_lora'):
    if key not in origin:
      provenance.pop(key, None)
  provenance |= origin
  return part


def _of_folder(name: str, folder) -> model_folder.Part:
  """Reads a network of a folder, with the fingerprint of the vocabulary that it needs."""
  part = model_folder.load_part(name, folder)
  shared = storage.join(folder, model_folder.VOCABULARY_FILE)
  if (
    part.vocabulary_path or 'vocabulary' not in _NEEDED.get(name, ()) or not storage.exists(shared)
  ):
    return part
  kept = {'vocabulary': text_tokenizer.open_tokenizer(shared).fingerprint}
  return part._replace(made_with=kept | part.made_with)


def _trained(
  name: str, model_dir, base: model_folder.Model | None
) -> tuple[model_folder.Part, dict[str, Any]]:
  """Reads a network from a run's newest checkpoint; returns it and its origin."""
  network = model_folder.NETWORKS[name]
  path = run_checkpoints.latest_checkpoint(model_dir)
  described = run_checkpoints.read_model(path)
  if 'lora' in described:
    return _adapted(name, model_dir, path, described, base)
  config = run_checkpoints.read_config(path, name)
  params = run_checkpoints.read_params(path, network.module(config), network.example_inputs(config))
  if averaged := sorted(run_checkpoints.averaged_parts(path, params)):
    print(f'--{name}={model_dir}: taking the moving average of {", ".join(averaged)}')
  part = model_folder.Part(config, params, _made_with(name, model_dir, path))
  return part, {f'{name}_steps': int(path.name)}


def _adapted(
  name: str, model_dir, path, described: Mapping[str, Any], base: model_folder.Model | None
) -> tuple[model_folder.Part, dict[str, Any]]:
  """Reads the adapters of a checkpoint; returns their base with them, and its origin."""
  found = trained_adapters.read(name, path, described)
  run, recorded = f'--{name}={model_dir}', described['lora']['base']
  part, origin = trained_adapters.base_of(found, run, recorded, base)
  merged = adapters_lib.merged(part, found)
  settings = found.settings._asdict() | {'base': found.base, 'steps': found.steps}
  print(f'{run}: adding its adapters of rank {found.settings.rank} to the base {found.base}')
  return (
    merged._replace(made_with=_made_with(name, model_dir, path)),
    origin | {f'{name}_lora': settings},
  )


def _made_with(name: str, model_dir, path) -> dict[str, str]:
  """Returns fingerprints of a network's vocabulary and tokenizer; warns about unknown ones."""
  position = run_checkpoints.read_place(path)
  kept = {kind: position[kind] for kind in fingerprints.KINDS if position.get(kind)}
  for kind in _NEEDED.get(name, ()):
    if kind not in kept:
      print(
        f'parti-jax: warning: --{name}={model_dir}: the checkpoint does not say which '
        f'{kind} it was trained with; make sure that it is the same as the one given here',
        file=sys.stderr,
      )
  return kept


def _made_with_base(base: model_folder.Model, names: list[str]) -> dict[str, dict[str, str]]:
  """Returns fingerprints for networks of a base model; computes those that an older one lacks."""
  networks = base.networks
  ours = {
    'vocabulary': text_tokenizer.open_tokenizer(base.vocabulary_path).fingerprint,
    'tokenizer': fingerprints.of_tokenizer(
      networks['tokenizer'].params, image_tokenizers.token_settings(networks['tokenizer'].config)
    ),
  }
  needed = _NEEDED | {'tokenizer': ('tokenizer',)}
  # A network with a text tokenizer of its own doesn't depend on the model's.
  return {
    name: {
      kind: ours[kind]
      for kind in needed.get(name, ())
      if kind != 'vocabulary' or networks[name].vocabulary_path is None
    }
    | networks[name].made_with
    for name in names
  }
