"""A training step's model FLOP/s as a share of what a matrix product reaches in the same run.

  python benchmarks/training_step.py [--json FILE]

The step is the real one: loss with dropout, gradients, clipping, Adam. The product is of two
1024×1024 float32 matrices. Both are warmed up and timed in turn, and the medians are compared.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh
from parti_jax.runs import allocator
from parti_jax.training import optimizers
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective


def seconds(function) -> float:
  """Wall time of a call until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--encoder_layers', type=int, default=1)
  parser.add_argument('--decoder_layers', type=int, default=1)
  parser.add_argument('--remat', default='everything')
  parser.add_argument('--dropout', type=float, default=0.1)
  parser.add_argument('--json', help='file for the figures')
  args = parser.parse_args()
  allocator.keep_freed()
  config = parti_config.PartiConfig(
    encoder_layers=args.encoder_layers,
    decoder_layers=args.decoder_layers,
    width=args.width,
    mlp_width=4 * args.width,
    heads=args.width // 64,
    text_vocabulary=1024,
    text_length=16,
    codebook_size=1024,
    grid=(8, 8),
    dropout=args.dropout,
    dtype='float32',
    remat=args.remat,
  )
  objective = generator_objective.GeneratorObjective(config)
  optimizer = optimizers.adamw(lambda step: 1e-3)
  trainer = trainer_lib.Trainer(objective, optimizer, mesh.make_mesh(devices=jax.devices()[:1]))
  state = trainer.create_state()
  rng = np.random.default_rng(0)
  batch = trainer.put(
    {
      'encoder_input_tokens': rng.integers(3, 1024, (args.batch_size, 16), np.int32),
      'decoder_target_tokens': rng.integers(0, 1024, (args.batch_size, 64), np.int32),
      'decoder_loss_weights': np.ones((args.batch_size, 64), np.float32),
    }
  )
  matrix = jnp.asarray(rng.standard_normal((1024, 1024), np.float32))
  product = jax.jit(jnp.matmul)

  def step():
    nonlocal state
    state, metrics = trainer.step(state, batch)
    return metrics

  def products():
    return [product(matrix, matrix) for _ in range(20)]

  for _ in range(2):
    seconds(step), seconds(products)
  times = [(seconds(step), seconds(products)) for _ in range(args.rounds)]
  step_rate = objective.step_flops(args.batch_size) / statistics.median(t for t, _ in times)
  peak = 20 * 2 * 1024**3 / statistics.median(t for _, t in times)
  figures = {
    'parameters': layers.count_parameters(state.params),
    'batch_size': args.batch_size,
    'step_model_flops_per_second': step_rate,
    'product_flops_per_second': peak,
    'share': step_rate / peak,
  }
  print(
    f'{figures["parameters"] / 1e6:.1f}M parameters, batch {args.batch_size}: '
    f'{step_rate / 1e9:.1f} GFLOP/s; a 1024×1024 product: {peak / 1e9:.1f} GFLOP/s; '
    f'share {step_rate / peak:.3f}'
  )
  if args.json:
    with open(args.json, 'w', encoding='utf-8') as file:
      json.dump(figures, file, indent=2)


if __name__ == '__main__':
  main()
