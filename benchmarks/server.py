"""The server's pictures per second with few and many clients, compared with one big batch; and its memory.

  python benchmarks/server.py [--clients 1 8 64] [--requests N] [--json FILE]

Starts `parti-jax serve` and draws the same pictures in ways that take turns in one run:

- as big batches: one call of `TextToImage.generate`, in batches of as many pictures as the server
  has slots;
- through the server: that many clients, each of which asks for one picture, waits for it, and asks
  for the next one over the same connection.

Ratios are those of a round to the big batches of the same round, and the median over rounds is
printed. Next to that of pictures per second is that of processor time per picture, of the server's
process alone; other programs on the machine affect it less. Then --requests more pictures are drawn
by the most clients, of which one in ten goes away before its picture is there, and the server's
memory, threads and open files are read before, halfway and after.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

import parti_jax

PROMPTS = [
  f'{person} {job}: {tone} skin tone'
  for person in ('woman', 'man')
  for job in ('firefighter', 'cook', 'farmer', 'pilot', 'teacher', 'singer')
  for tone in ('light', 'medium', 'dark')
]
# One client in so many goes away before its picture is there.
LEAVES = 10


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='a model folder (default: the demo model)')
  parser.add_argument('--batch_size', type=int, default=16, help='(%(default)s)')
  parser.add_argument('--clients', type=int, nargs='+', default=[1, 8, 64], help='(%(default)s)')
  parser.add_argument('--pictures', type=int, default=256, help='in a round (%(default)s)')
  parser.add_argument('--rounds', type=int, default=5, help='(%(default)s)')
  parser.add_argument(
    '--requests', type=int, default=0, help='pictures for the measurement of memory (%(default)s)'
  )
  parser.add_argument('--json', metavar='FILE', help='also write the numbers there')
  args = parser.parse_args()
  model = parti_jax.load(args.model)
  with server(args) as (process, port):
    rounds = [measured(model, process, port, args) for _ in range(args.rounds + 1)][
      1:
    ]  # The first compiles.
    report(rounds, args)
    memory = soak(process, port, args) if args.requests else None
  if args.json:
    found = {'rounds': rounds, 'memory': memory}
    pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')


@contextlib.contextmanager
def server(args):
  """Yields the server's process and its port."""
  command = [sys.executable, '-m', 'parti_jax.cli.main', 'serve', '--port=0']
  command += [f'--batch_size={args.batch_size}', f'--queue={2 * max(args.clients) + 16}']
  if args.model:
    command.append(f'--model={args.model}')
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    line = process.stdout.readline()
    yield process, int(re.search(r':(\d+)/', line)[1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
  finally:
    process.kill()


def measured(model, process, port: int, args) -> dict:
  """One round: the seconds of big batches, and of each number of clients."""
  prompts = [PROMPTS[place % len(PROMPTS)] for place in range(args.pictures)]
  begin, own = time.perf_counter(), time.process_time()
  result = model.generate(prompts, num_images=1, batch_size=args.batch_size)
  seconds, own = time.perf_counter() - begin, time.process_time() - own
  row = {'seconds': seconds, 'processor_seconds': own, 'clients': {}}
  for clients in args.clients:
    begin, before = time.perf_counter(), processor_seconds(process)
    images = through_server(port, clients, prompts)
    taken = time.perf_counter() - begin
    differ = np.abs(images.astype(int) - result.images[:, 0]).max(axis=(1, 2, 3))
    row['clients'][clients] = {
      'pictures_per_second': args.pictures / taken,
      'ratio': seconds / taken,
      'processor_ratio': own / (processor_seconds(process) - before),
      'same': float((differ <= 1).mean()),
    }
  return row


def through_server(port: int, clients: int, prompts: list[str]) -> np.ndarray:
  """The pictures of prompts, drawn for so many clients at once; uint8 [prompts, height, width, 3]."""
  images = [None] * len(prompts)

  def work(first: int):
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, 600)) as connection:
      for place in range(first, len(prompts), clients):
        images[place] = picture(ask(connection, prompts[place]))

  with concurrent.futures.ThreadPoolExecutor(clients) as threads:
    list(threads.map(work, range(clients)))
  return np.stack(images)


def ask(connection: http.client.HTTPConnection, prompt: str, seed: int = 0) -> dict:
  """The answer for one picture."""
  send(connection, prompt, seed)
  answer = connection.getresponse()
  content = json.loads(answer.read())
  if answer.status != 200:
    raise SystemExit(f'the server answered {answer.status}: {content}')
  return content


def send(connection: http.client.HTTPConnection, prompt: str, seed: int):
  """Asks for one picture."""
  connection.request(
    'POST',
    '/v1/images/generations',
    json.dumps({'prompt': prompt, 'seed': seed}),
    {'Content-Type': 'application/json'},
  )


def picture(content: dict) -> np.ndarray:
  """The pixels of an answer."""
  with Image.open(io.BytesIO(base64.b64decode(content['data'][0]['b64_json']))) as image:
    return np.asarray(image)


def soak(process, port: int, args) -> list[dict]:
  """Draws many pictures, some of which nobody waits for; returns what the server takes."""
  clients = max(args.clients)
  readings = [reading(process, 0)]

  def work(count: int):
    for place in range(count):
      connection = http.client.HTTPConnection('127.0.0.1', port, 600)
      with contextlib.closing(connection):
        if place % LEAVES == 0:
          send(connection, PROMPTS[place % len(PROMPTS)], place)
        else:
          ask(connection, PROMPTS[place % len(PROMPTS)], place)

  for half in (1, 2):
    with concurrent.futures.ThreadPoolExecutor(clients) as threads:
      list(threads.map(work, [-(-args.requests // (2 * clients))] * clients))
    while health(port)['pending']:
      time.sleep(0.1)
    readings.append(reading(process, half * args.requests // 2))
  print('| requests | resident memory, MiB | threads | open files |')
  print('|---|---|---|---|')
  for row in readings:
    print(
      f'| {row["requests"]:,} | {row["bytes"] / 2**20:.0f} | {row["threads"]} | {row["files"]} |'
    )
  return readings


def health(port: int) -> dict:
  """What the server says of itself."""
  with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, 60)) as connection:
    connection.request('GET', '/health')
    return json.loads(connection.getresponse().read())


def reading(process, requests: int) -> dict:
  """What the server's process takes, from Linux' /proc."""
  folder = pathlib.Path('/proc') / str(process.pid)
  status = (folder / 'status').read_text()
  number = lambda name: int(re.search(rf'^{name}:\s+(\d+)', status, re.MULTILINE)[1])
  return {
    'requests': requests,
    'bytes': 1024 * number('VmRSS'),
    'threads': number('Threads'),
    'files': len(list((folder / 'fd').iterdir())),
  }


def processor_seconds(process) -> float:
  """The processor time that the server's process has taken."""
  fields = (
    (pathlib.Path('/proc') / str(process.pid) / 'stat').read_text().rpartition(')')[2].split()
  )
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def report(rounds: list[dict], args):
  """Prints the medians."""
  speeds = [args.pictures / row['seconds'] for row in rounds]
  print(f'big batches of {args.batch_size}: {np.median(speeds):.1f} pictures per second')
  print('| clients | pictures per second / big batches | range | processor time | same pictures |')
  print('|---|---|---|---|---|')
  for clients in args.clients:
    rows = [row['clients'][clients] for row in rounds]
    ratios = [row['ratio'] for row in rows]
    own = np.median([row['processor_ratio'] for row in rows])
    same = 100 * np.mean([row['same'] for row in rows])
    print(
      f'| {clients} | {np.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | '
      f'{own:.2f} | {same:.1f}% |'
    )


if __name__ == '__main__':
  main()
