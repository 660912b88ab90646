"""How long a training step takes of each part of the model of names and scenes.

  python benchmarks/scenes_steps.py [--batch_size 8] [--runs tokenizer generator ...]

times steps of the gin files that launch/scenes_demo.sh runs, on one device, with pictures of noise and
a tokenizer with random parameters. It prints the seconds of a step with the batch of the gin file,
from those with --batch_size: processor time, which other programs on a CPU don't change much, and
time by the clock, which counts on a GPU or TPU.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import gin
import jax
import numpy as np

import parti_jax
from parti_jax.core import gin_config
from parti_jax.exported_model import model_folder
from parti_jax.models import image_tokenizers
from parti_jax.training import configurables  # noqa: F401

RUNS = (
  'tokenizer',
  'tokenizer_vqgan',
  'tokenizer_decoder',
  'generator',
  'ranker',
  'super_resolution',
)
_VQGAN = 'TokenizerObjective.model = @VQGANConfig()'
# Steps timed after the one that compiles.
STEPS = 3


def write_tokenizer(folder: str) -> None:
  """Writes a tokenizer with random parameters as a folder that the runs take."""
  gin_config.parse(['gin_configs/runs/scenes_tokenizer.gin'], [])
  config = gin.query_parameter('TokenizerObjective.model').scoped_configurable_fn()
  module = image_tokenizers.module(config)
  params = module.init(jax.random.key(0), *image_tokenizers.example_inputs(config))['params']
  model_folder.save_part(folder, 'tokenizer', model_folder.Part(config, params, {}), {})


def parse(run: str, tokenizer: str) -> None:
  """Sets gin for a run, with the tokenizer in a folder."""
  bindings = {
    'tokenizer': [],
    'tokenizer_vqgan': [_VQGAN],
    'tokenizer_decoder': [f'TokenizerObjective.first_phase = {tokenizer!r}'],
    'generator': ['GeneratorObjective.tokenizer = None'],
    'ranker': [f'RankerObjective.tokenizer = {tokenizer!r}'],
    'super_resolution': [f'SuperResolutionObjective.tokenizer = {tokenizer!r}'],
  }[run]
  file = run.removesuffix('_vqgan')
  gin_config.parse([f'gin_configs/runs/scenes_{file}.gin'], bindings)


def noise(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
  """Returns a batch of random pictures and tokens, all with a weight of 1."""
  rng = np.random.default_rng(0)
  of = {
    np.dtype(np.uint8): lambda shape: rng.integers(0, 256, shape).astype(np.uint8),
    np.dtype(np.int32): lambda shape: rng.integers(3, 1000, shape).astype(np.int32),
  }
  ones = lambda shape: np.ones(shape, np.float32)
  return {name: of.get(leaf.dtype, ones)(leaf.shape) for name, leaf in shapes.items()}


def measure(batch_size: int) -> tuple[float, float]:
  """Returns the median seconds of a step of gin's run: processor time, and time by the clock."""
  value = lambda name: gin.query_parameter(f'train.{name}').scoped_configurable_fn
  objective, schedule = value('objective')(), value('schedule')()
  mesh = parti_jax.make_mesh(devices=jax.devices()[:1])
  trainer = parti_jax.Trainer(objective, value('optimizer')(schedule), mesh)
  state = trainer.create_state()
  batch = trainer.put(noise(objective.abstract_batch(batch_size)))
  times = []
  for _ in range(STEPS + 1):
    before = time.process_time(), time.perf_counter()
    state, _ = trainer.step(state, batch)
    jax.block_until_ready(state.params)
    times.append((time.process_time() - before[0], time.perf_counter() - before[1]))
  processor, clock = zip(*times[1:])
  return statistics.median(processor), statistics.median(clock)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--batch_size', type=int, default=8, help='(default: %(default)s)')
  parser.add_argument('--runs', nargs='+', choices=RUNS, default=RUNS)
  args = parser.parse_args()
  device = jax.devices()[0]
  print(f'on one {device.platform} device ({device.device_kind}), batches of {args.batch_size}')
  print('| run | batch | processor, s per step | clock, s per step | steps of the gin file |')
  print('|---|---|---|---|---|')
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = str(pathlib.Path(folder) / 'tokenizer')
    write_tokenizer(tokenizer)
    for run in args.runs:
      parse(run, tokenizer)
      full, steps = (gin.query_parameter(f'train.{name}') for name in ('batch_size', 'steps'))
      processor, clock = (seconds * full / args.batch_size for seconds in measure(args.batch_size))
      print(f'| {run} | {full} | {processor:.3g} | {clock:.3g} | {steps:,} |', flush=True)


if __name__ == '__main__':
  main()
