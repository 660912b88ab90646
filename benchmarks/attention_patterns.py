"""Schedules of attention patterns: cache, sampling and training step, compared with all-global layers.

  python benchmarks/attention_patterns.py [--json FILE]

The same network with each schedule, from random parameters, in float32. What is timed is warmed
up; then the schedules take turns, and the fastest round of each counts. Ratios are of this
process's processor time, on which other programs have little influence. Scores are those of one
head for one sequence, over all layers, as the traced training step computes them.

  python benchmarks/attention_patterns.py --picture docs/attention_patterns.png

draws the patterns instead.
"""

import argparse
import functools
import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL import ImageDraw

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import layers
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.training.objectives import generator_objective

SCHEDULES = {
  'global': ('global',),
  'conv': ('conv',),
  'conv, global': ('conv', 'global'),
  'row, column, row, conv': ('row', 'column', 'row', 'conv'),
}
TEXT_LENGTH, VOCABULARY, HEAD_DIM = 32, 1024, 64


def sizes(args, schedule) -> parti_config.PartiConfig:
  return parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=args.layers,
    width=args.width,
    mlp_width=4 * args.width,
    heads=args.width // HEAD_DIM,
    text_vocabulary=VOCABULARY,
    text_length=TEXT_LENGTH,
    codebook_size=VOCABULARY,
    grid=(args.side, args.side),
    dropout=0.0,
    dtype='float32',
    remat='dots',
    attention_patterns=schedule,
  )


def cache_bytes(config) -> int:
  """Bytes of one sequence's whole cache, over all layers."""
  slots = sum(
    config.layer_pattern(layer).num_slots(config.image_length)
    for layer in range(config.decoder_layers)
  )
  return 2 * slots * config.width * config.compute_dtype.itemsize


def scores(config) -> int:
  """Scores that all layers compute, of a sequence and a head: those that are exponentiated."""

  def exponentiated(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == 'exp':
        yield equation.outvars[0].aval.size
      for value in equation.params.values():
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          yield from exponentiated(inner)

  total, inputs = 0, [jax.ShapeDtypeStruct((1, config.image_length, 1, HEAD_DIM), jnp.float32)] * 3
  for layer in range(config.decoder_layers):
    form = functools.partial(
      dot_product_attention.attend_in_pattern, pattern=config.layer_pattern(layer)
    )
    total += sum(exponentiated(jax.make_jaxpr(form)(*inputs).jaxpr))
  return total


def sampling(args, config):
  """A function that draws a batch."""
  init = functools.partial(parti.Parti(config).init, jax.random.key(0))
  params = parameters.for_sampling(
    config, nn.meta.unbox(jax.jit(init)(*parti.example_inputs(config))['params'])
  )

  @jax.jit
  def draw(params, texts, image_index):
    keys = decoding.image_keys(jnp.uint32(0), image_index)
    return decoding.sample_tokens(config, params, texts, keys, decoding.Sampling())

  texts = jnp.full((args.batch_size, TEXT_LENGTH), 5)
  return lambda: draw(params, texts, jnp.arange(args.batch_size))


def training(args, config):
  """A function that computes loss and gradients of a batch."""
  objective = generator_objective.GeneratorObjective(config)
  params = nn.meta.unbox(jax.jit(objective.init)(jax.random.key(0)))
  batch = jax.tree.map(
    lambda leaf: jnp.ones(leaf.shape, leaf.dtype), objective.abstract_batch(args.train_batch_size)
  )

  @jax.jit
  def gradients(params, batch):
    keys = layers.dropout_keys(jax.random.key(0), args.train_batch_size)
    return jax.grad(lambda params: objective.loss(params, batch, keys, 0)[0])(params)

  return lambda: gradients(params, batch)


def fastest(functions, rounds: int):
  """Seconds of each function's fastest round, by the clock and of processors; they take turns."""
  for function in functions:
    jax.block_until_ready(function())
  clocks = time.perf_counter, time.process_time
  best = np.full((len(clocks), len(functions)), np.inf)
  for _ in range(rounds):
    for place, function in enumerate(functions):
      start = [clock() for clock in clocks]
      jax.block_until_ready(function())
      passed = [clock() - before for clock, before in zip(clocks, start)]
      best[:, place] = np.minimum(best[:, place], passed)
  return best.tolist()


def picture(path: str, side: int = 16, kernel: int = 5, zoom: int = 14):
  """Draws what one position sees on the grid and, below, the masks of all positions."""
  colors = np.array([[240, 240, 244], [96, 150, 216], [216, 92, 60]], np.uint8)
  query, width = side * (side // 2) + side // 2, side * zoom
  step = width + 2 * zoom
  canvas = Image.new('RGB', (4 * step + zoom, 2 * step + 2 * zoom), 'white')
  for place, name in enumerate(attention_patterns.PATTERNS):
    mask = attention_patterns.AttentionPattern(name, (side, side), kernel).mask
    grid = mask[query].astype(int)
    grid[query] = 2
    left = zoom + place * step
    label = f'{name}, {kernel} x {kernel}' if name == 'conv' else name
    ImageDraw.Draw(canvas).text((left, 2), label, fill='black')
    for top, values in ((2 * zoom, grid.reshape(side, side)), (3 * zoom + width, mask * 1)):
      tile = Image.fromarray(colors[values]).resize((width, width), Image.Resampling.NEAREST)
      canvas.paste(tile, (left, top))
    lines = ImageDraw.Draw(canvas)
    for line in range(side + 1):
      offset = line * zoom
      lines.line([(left + offset, 2 * zoom), (left + offset, 2 * zoom + width)], fill='white')
      lines.line([(left, 2 * zoom + offset), (left + width, 2 * zoom + offset)], fill='white')
  canvas.save(path, optimize=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--side', type=int, default=32, help='rows and columns of image tokens')
  parser.add_argument('--batch_size', type=int, default=8, help='of sampling')
  parser.add_argument('--train_batch_size', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--json', help='file for the numbers')
  parser.add_argument('--picture', help='file to draw the patterns to; nothing is measured then')
  args = parser.parse_args()
  if args.picture:
    picture(args.picture)
    return
  configs = {name: sizes(args, schedule) for name, schedule in SCHEDULES.items()}
  tokens = args.batch_size * args.side**2
  draws, draws_cpu = fastest([sampling(args, config) for config in configs.values()], args.rounds)
  steps, steps_cpu = fastest([training(args, config) for config in configs.values()], args.rounds)
  rows = {
    name: {
      'cache_bytes': cache_bytes(config),
      'tokens_per_second': tokens / draw,
      'sampling_speed': draws_cpu[0] / draws_cpu[place],
      'scores': scores(config),
      'training_step_seconds': step,
      'training_speed': steps_cpu[0] / steps_cpu[place],
    }
    for place, ((name, config), draw, step) in enumerate(zip(configs.items(), draws, steps))
  }
  print(
    '| schedule | cache of a sequence, MB | tokens/s | over global | scores | '
    'training step, s | over global |\n|' + '---|' * 7
  )
  for name, row in rows.items():
    print(
      f'| {name} | {row["cache_bytes"] / 1e6:.1f} | {row["tokens_per_second"]:.0f} | '
      f'{row["sampling_speed"]:.2f} | {row["scores"]:,} | '
      f'{row["training_step_seconds"]:.2f} | {row["training_speed"]:.2f} |'
    )
  if args.json:
    with open(args.json, 'w', encoding='utf-8') as file:
      json.dump({'arguments': vars(args), 'rows': rows}, file, indent=2)


if __name__ == '__main__':
  main()
