"""Continuous batching: pictures per second of prompts that arrive one by one, and of one big batch.

  python benchmarks/continuous_batching.py [--batch_size N] [--json FILE]

Draws the same pictures, one of each prompt, in three ways that take turns in one run:

- as big batches: one call of `TextToImage.generate`;
- as a queue: each prompt is a request to a ContinuousSampler, and all arrive at once;
- as arrivals: the requests arrive at random times (a Poisson process) at --load times the rate of
  the big batches, so that they join and leave while others are sampled. The rate counts from the
  first quarter of the pictures to the third, while the batch is full.

Ratios are those of a round to the big batches of the same round, and the median over rounds is
printed. The benchmark also checks that all three draw the same tokens.
"""

import argparse
import json
import pathlib
import time

import numpy as np

import parti_jax
from parti_jax.sampling import continuous

PROMPTS = [
  f'{person} {job}: {tone} skin tone'
  for person in ('woman', 'man')
  for job in ('firefighter', 'cook', 'farmer', 'pilot', 'teacher', 'singer')
  for tone in ('light', 'medium', 'dark')
]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='a model folder (default: the demo model)')
  parser.add_argument('--batch_size', type=int, default=16, help='(%(default)s)')
  parser.add_argument('--tokens_per_call', type=int, nargs='+', default=[8], help='(%(default)s)')
  parser.add_argument('--batches', type=int, default=3, help='big batches in a round (%(default)s)')
  parser.add_argument('--load', type=float, default=1.2, help='(%(default)s)')
  parser.add_argument('--rounds', type=int, default=5, help='(%(default)s)')
  parser.add_argument('--json', metavar='FILE', help='also write the numbers there')
  args = parser.parse_args()
  model = parti_jax.load(args.model)
  count = args.batches * args.batch_size
  prompts = [PROMPTS[place % len(PROMPTS)] for place in range(count)]
  samplers = {
    number: continuous.ContinuousSampler(model, args.batch_size, number)
    for number in args.tokens_per_call
  }
  rounds = []
  for turn in range(args.rounds + 1):  # The first one compiles.
    seconds, tokens = big_batches(model, prompts, args.batch_size)
    row = {'seconds': seconds, 'pictures_per_second': count / seconds}
    for number, sampler in samplers.items():
      for name, rate in (('queue', None), ('arrivals', args.load * count / seconds)):
        speed, drawn, latency = requests(sampler, prompts, rate)
        row[f'{name}, {number} tokens per call'] = {
          'pictures_per_second': speed,
          'ratio': speed * seconds / count,
          'same': float((drawn == tokens).all(axis=-1).mean()),
          'latency_in_batches': latency * args.batches / seconds,
        }
    print(f'round {turn}: {count / seconds:.1f} pictures per second as big batches', flush=True)
    if turn:
      rounds.append(row)
  for sampler in samplers.values():
    sampler.close()
  speeds = [row['pictures_per_second'] for row in rounds]
  print(f'{count} pictures, batches of {args.batch_size}: {np.median(speeds):.1f} per second')
  print(
    '| requests | pictures per second / big batches | range | same tokens | latency in batches |'
  )
  print('|---|---|---|---|---|')
  for name in (name for name, value in rounds[0].items() if isinstance(value, dict)):
    print(line(name, [row[name] for row in rounds]))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rounds, indent=2) + '\n', encoding='utf-8')


def big_batches(model, prompts, batch_size: int) -> tuple[float, np.ndarray]:
  """Seconds for all pictures, and their tokens."""
  begin = time.perf_counter()
  result = model.generate(prompts, num_images=1, batch_size=batch_size)
  return time.perf_counter() - begin, result.tokens[:, 0]


def requests(sampler, prompts, rate: float | None) -> tuple[float, np.ndarray, float]:
  """Asks for the pictures one by one.

  Args:
    sampler: the sampler.
    prompts: the prompts.
    rate: mean number of requests per second; None for all at once.

  Returns:
    Pictures per second, the tokens, and the median time in seconds from a request to its picture.
  """
  waits = np.zeros(len(prompts))
  if rate is not None:
    waits = np.random.default_rng(0).exponential(1 / rate, len(prompts))
  asked, finished, futures = [], [0.0] * len(prompts), []

  def note(place):
    return lambda future: finished.__setitem__(place, time.perf_counter())

  begin = due = time.perf_counter()
  for place, (prompt, wait) in enumerate(zip(prompts, waits)):
    due += wait
    time.sleep(max(0.0, due - time.perf_counter()))
    asked.append(time.perf_counter())
    futures.append(sampler.submit(prompt))
    futures[-1].add_done_callback(note(place))
  tokens = np.stack([future.result().tokens[0, 0] for future in futures])
  latency = float(np.median(np.array(finished) - asked))
  ends = np.sort(finished)
  if rate is None:
    return len(prompts) / (ends[-1] - begin), tokens, latency
  first, last = len(prompts) // 4, 3 * len(prompts) // 4
  return (last - first) / (ends[last] - ends[first]), tokens, latency


def line(name: str, rows: list[dict]) -> str:
  """A row of the table, in Markdown."""
  ratios = [row['ratio'] for row in rows]
  cells = [
    name,
    f'{np.median(ratios):.2f}',
    f'{min(ratios):.2f} to {max(ratios):.2f}',
    f'{100 * np.mean([row["same"] for row in rows]):.1f}%',
    f'{np.median([row["latency_in_batches"] for row in rows]):.1f}',
  ]
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  main()
