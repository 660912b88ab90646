"""Tries meshes, remat policies and microbatches, each in a separate process."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax

from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import numerics
from parti_jax.core import storage
from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.partitioning import compiler_options
from parti_jax.planning import candidates as candidates_lib
from parti_jax.planning import report
from parti_jax.planning import request as request_lib
from parti_jax.planning import steps
from parti_jax.planning import topology as topology_lib

# Maximum characters of a failed candidate's error.
_ERROR_LENGTH = 300


@numerics.fixed()
def run(request: request_lib.Request, limit: int, file: str | None) -> int:
  """Compiles the most promising candidates and prints those that fit, the fastest bound first.

  Args:
    request: what to plan; a candidate's bindings override its bindings.
    limit: maximum number of candidates to compile.
    file: path of JSON lines, one for each tried candidate, {'request', 'candidate', 'plan',
      'error'}. Candidates in it aren't tried again. None to store nothing.

  Returns:
    0 if a candidate fits, else 1.
  """
  tried = _read(file, request)
  found = candidates(request)
  print(
    f'{len(found)} candidates may fit; compiling the best {min(limit, len(found))} by a rough '
    'estimate',
    file=sys.stderr,
  )
  plans = []

  def attempt(bindings: list[str], number: str) -> None:
    key = json.dumps(bindings)
    if key not in tried:
      plan, error = compile_in_process(request, bindings)
      tried[key] = {
        'request': _request(request),
        'candidate': bindings,
        'plan': plan,
        'error': error,
      }
      _write(file, tried)
    plan, error = tried[key]['plan'], tried[key]['error']
    print(f'{number}: {_line(bindings, plan, error)}', file=sys.stderr)
    if plan and plan['fits']:
      plans.append((_slowness(plan), bindings, plan))

  for number, candidate in enumerate(found[:limit], 1):
    attempt(candidate.bindings(), f'{number}/{min(limit, len(found))}')
  if not plans:
    print('none of the candidates fits')
    return 1
  if request.what == 'train' and topology_lib.parse(request.topology).chip:
    best = min(plans, key=lambda plan: plan[0])[1]
    for name, options in compiler_options.TPU_ALTERNATIVES.items():
      attempt([*best, f'compiler_options.tpu = {options!r}'], f'the best with {name}')
  plans.sort(key=lambda plan: plan[0])
  print(report.table([plan for _, _, plan in plans]))
  return 0


def candidates(request: request_lib.Request) -> list[candidates_lib.Candidate]:
  """Returns candidates for a request, the most promising first.

  Raises:
    UserError: if the run doesn't train the generator, the only model that the search supports.
  """
  jax.config.update('jax_platforms', 'cpu')
  topology = topology_lib.parse(request.topology)
  devices = len(topology.devices())
  gin_config.parse(request.gin_files, request.gin_bindings, data=False)
  if request.what == 'sample':
    images = request.batch_size or steps.SAMPLING_BATCH
    sequences = images * (2 if request.guided else 1)
    return candidates_lib.of_sampling(
      steps.sampled_config(),
      sequences,
      images,
      topology.chip,
      devices,
      bytes_per_weight=1 if request.weights == 'int8' else 2,
      bytes_per_key=1 if request.cache == 'int8' else 2,
    )
  config = steps.train_config()
  model = config.objective.model
  if not isinstance(model, parti_config.PartiConfig):
    raise errors.UserError(
      '--search supports only the generator; plan other models with your own --gin.make_mesh... '
      'values'
    )
  with layers.only_shapes():
    parameters = layers.count_parameters(jax.eval_shape(config.objective.init, jax.random.key(0)))
  return candidates_lib.of_training(
    model,
    parameters,
    request.batch_size or config.batch_size,
    topology.chip,
    devices,
    topology.slices,
  )


def compile_in_process(
  request: request_lib.Request, bindings: list[str]
) -> tuple[dict[str, Any] | None, str | None]:
  """Plans a candidate in another process; returns its plan, or the error that it ended with."""
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / 'plan.json'
    command = [
      sys.executable,
      '-m',
      'parti_jax.cli.main',
      'plan',
      f'--topology={request.topology}',
      f'--what={request.what}',
      f'--json={output}',
    ]
    command += [f'--gin_file={file}' for file in request.gin_files]
    command += [f'--gin.{binding}' for binding in (*request.gin_bindings, *bindings)]
    if request.batch_size:
      command.append(f'--batch_size={request.batch_size}')
    if not request.guided:
      command.append('--unguided')
    command += [f'--weights={request.weights}', f'--cache={request.cache}']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.exists():
      return json.loads(output.read_text(encoding='utf-8')), None
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    return None, f'exit status {done.returncode}: {last[:_ERROR_LENGTH]}'


def _slowness(plan) -> float:
  """Returns the seconds of the roofline; for emulated devices, the FLOPs."""
  seconds = plan['seconds']
  if seconds is None:
    return plan['flops']['compiled']
  return max(seconds[part] for part in ('compute', 'hbm', 'interconnect'))


def _line(bindings: list[str], plan, error) -> str:
  said = ' '.join(binding.replace(' = ', '=') for binding in bindings)
  if error:
    return f'{said}: {error}'
  if not plan['fits']:
    return f'{said}: too large'
  bound = f', MFU at most {plan["mfu"]["bound"]:.1%}' if plan['mfu'] else ''
  return f'{said}: fits{bound}'


def _read(file: str | None, request) -> dict[str, dict[str, Any]]:
  """Reads a file's candidates, by their bindings; raises UserError for those of another request."""
  if file is None or not pathlib.Path(file).exists():
    return {}
  found = {}
  for number, line in enumerate(pathlib.Path(file).read_text(encoding='utf-8').splitlines(), 1):
    try:
      entry = json.loads(line)
      same = entry['request'] == _request(request)
    except (ValueError, KeyError, TypeError) as error:
      raise errors.UserError(
        f'{file}:{number}: not a search result: {error}; remove the file or choose another --json'
      ) from error
    if not same:
      raise errors.UserError(f'{file} holds a search of another request; choose another --json')
    found[json.dumps(entry['candidate'])] = entry
  return found


def _request(request) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(request)))


def _write(file: str | None, tried: dict[str, dict[str, Any]]):
  if file is not None:
    storage.write(file, ''.join(f'{json.dumps(entry)}\n' for entry in tried.values()))
