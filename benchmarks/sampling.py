"""Image tokens a second: parti_jax against transformers' T5 and parti-pytorch.

  python benchmarks/sampling.py [--torch_python PYTHON] [--json FILE]

All draw the same number of tokens for the same batch, from random parameters, in float32, with
the same layers and widths. T5 (an encoder and a decoder like ours) samples with its cache.
parti-pytorch has no cache and always runs guidance's second pass, so it is compared with our guided
sampling; its text embeddings are given to it for free. Every system runs in a process of its
own, is warmed up, and then they are timed in turn; the fastest round of each counts.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import types

TEXT_LENGTH = 32
VOCABULARY = 1024
HEAD_DIM = 64
GUIDANCE_SCALE = 3.0
KEPT = 0.1  # Share of the codebook that parti-pytorch draws from, by default.


def parti_jax_system(args, guided: bool):
  """A function that draws a batch with parti_jax."""
  import functools

  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from parti_jax.models import parti
  from parti_jax.models import parti_config
  from parti_jax.sampling import decoding
  from parti_jax.sampling import parameters

  side = round(args.tokens**0.5)
  config = parti_config.PartiConfig(
    encoder_layers=args.layers,
    decoder_layers=args.layers,
    width=args.width,
    mlp_width=4 * args.width,
    heads=args.width // HEAD_DIM,
    text_vocabulary=VOCABULARY,
    text_length=TEXT_LENGTH,
    codebook_size=VOCABULARY,
    grid=(side, side),
    dtype='float32',
  )
  init = functools.partial(parti.Parti(config).init, jax.random.key(0))
  params = parameters.for_sampling(
    config, nn.meta.unbox(jax.jit(init)(*parti.example_inputs(config))['params'])
  )

  @jax.jit
  def draw(params, texts, image_index):
    keys = decoding.image_keys(jnp.uint32(0), image_index)
    return decoding.sample_tokens(
      config,
      params,
      texts,
      keys,
      decoding.Sampling(
        GUIDANCE_SCALE, top_k=round(KEPT * VOCABULARY), guided=guided, filtered=guided
      ),
    )

  texts = jnp.full((args.batch_size, TEXT_LENGTH), 5)
  return lambda: jax.block_until_ready(draw(params, texts, jnp.arange(args.batch_size)))


def t5_system(args):
  """A function that draws a batch with transformers' T5 of random parameters."""
  import torch
  import transformers

  config = transformers.T5Config(
    vocab_size=VOCABULARY,
    d_model=args.width,
    d_kv=HEAD_DIM,
    d_ff=4 * args.width,
    num_layers=args.layers,
    num_decoder_layers=args.layers,
    num_heads=args.width // HEAD_DIM,
    feed_forward_proj='gelu',
    tie_word_embeddings=False,
    decoder_start_token_id=0,
  )
  model = transformers.T5ForConditionalGeneration(config).eval()
  texts = torch.full((args.batch_size, TEXT_LENGTH), 5)

  def draw():
    with torch.inference_mode():
      drawn = model.generate(
        input_ids=texts,
        attention_mask=torch.ones_like(texts),
        do_sample=True,
        top_k=0,
        use_cache=True,
        min_new_tokens=args.tokens,
        max_new_tokens=args.tokens,
      )
    assert drawn.shape == (args.batch_size, args.tokens + 1)

  return draw


def parti_pytorch_system(args):
  """A function that draws a batch with parti-pytorch, guided as it always is."""
  import torch
  import transformers

  _without_torchvision()
  import parti_pytorch
  from parti_pytorch import t5

  class Tokenizer(torch.nn.Module):
    """As much of an image tokenizer as is needed to draw tokens and leave them as they are."""

    codebook_size, image_size = VOCABULARY, 256

    def __init__(self):
      super().__init__()
      self.anywhere = torch.nn.Parameter(torch.zeros(()))

    def get_encoded_fmap_size(self, unused_size):
      return round(args.tokens**0.5)

    def get_fmap_from_codebook(self, tokens):
      return tokens

    def decode(self, tokens):
      return tokens

  t5.T5_CONFIGS['ours'] = {'config': transformers.T5Config(d_model=args.width)}
  model = parti_pytorch.Parti(
    vae=Tokenizer(),
    dim=args.width,
    depth=args.layers,
    dim_head=HEAD_DIM,
    heads=args.width // HEAD_DIM,
    t5_name='ours',
    max_text_len=TEXT_LENGTH,
  ).eval()
  text = torch.randn(args.batch_size, TEXT_LENGTH, args.width)
  mask = torch.ones(args.batch_size, TEXT_LENGTH, dtype=torch.bool)
  model.encode_texts = lambda texts, output_device: (text, mask)
  with torch.inference_mode():  # A whole draw takes minutes; a step warms it up as well.
    model.forward_with_cond_scale(
      text_token_embeds=text,
      text_mask=mask,
      image_token_ids=torch.zeros(args.batch_size, args.tokens - 1, dtype=torch.long),
    )

  def draw():
    drawn = model.generate([''] * args.batch_size, cond_scale=GUIDANCE_SCALE)
    assert drawn.numel() == args.batch_size * args.tokens

  return draw


def _without_torchvision():
  """Lets parti-pytorch be imported where torchvision does not fit the installed torch.

  Its trainer and its perceptual loss use it; drawing does not.
  """
  try:
    import torchvision  # noqa: F401
  except (ImportError, RuntimeError):
    for name in ('', '.transforms', '.datasets', '.utils'):
      module = types.ModuleType('torchvision' + name)
      module.ImageFolder = module.make_grid = module.save_image = None
      sys.modules['torchvision' + name] = module
    sys.modules['torchvision'].transforms = sys.modules['torchvision.transforms']


SYSTEMS = {
  'parti_jax': lambda args: parti_jax_system(args, guided=False),
  'transformers T5': t5_system,
  'parti_jax, guided': lambda args: parti_jax_system(args, guided=True),
  'parti-pytorch, guided': parti_pytorch_system,
}
COMPARED = [('parti_jax', 'transformers T5'), ('parti_jax, guided', 'parti-pytorch, guided')]


def work(args):
  """Serves one system: warms it up, then times a draw for every line read."""
  with contextlib.redirect_stdout(sys.stderr):
    draw = SYSTEMS[args.system](args)
    if args.system != 'parti-pytorch, guided':
      draw()
  print('ready', flush=True)
  for _ in sys.stdin:
    with contextlib.redirect_stdout(sys.stderr):
      start = time.perf_counter()
      draw()
      seconds = time.perf_counter() - start
    print(seconds, flush=True)


def start_worker(name: str, args) -> subprocess.Popen:
  """A process that serves one system, warmed up."""
  python = sys.executable if name.startswith('parti_jax') else args.torch_python
  sizes = [
    f'--{size}={getattr(args, size)}' for size in ('layers', 'width', 'batch_size', 'tokens')
  ]
  worker = subprocess.Popen(
    [python, os.path.abspath(__file__), f'--system={name}', *sizes],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  if worker.stdout.readline() != 'ready\n':
    sys.exit(f'{name}: could not be started; see docs/benchmarks.md for what to install')
  return worker


def measure(args) -> dict[str, float]:
  """Seconds that each system takes for a batch, the fastest of its rounds."""
  names = [name for pair in COMPARED for name in pair if pair[1] not in args.without]
  workers = {name: start_worker(name, args) for name in names}
  seconds = {name: [] for name in names}
  for index in range(args.rounds):
    for name, worker in workers.items():
      if index and name == 'parti-pytorch, guided':
        continue  # It takes minutes; its first round is enough.
      print('go', file=worker.stdin, flush=True)
      seconds[name].append(float(worker.stdout.readline()))
  for worker in workers.values():
    worker.stdin.close()
    worker.wait()
  return {name: min(times) for name, times in seconds.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--layers', type=int, default=6, help='of the encoder and of the decoder')
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=256, help='a square number')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument(
    '--without',
    action='append',
    default=[],
    metavar='SYSTEM',
    help='leave out a comparison, such as "parti-pytorch, guided"',
  )
  parser.add_argument(
    '--torch_python',
    default=sys.executable,
    metavar='PYTHON',
    help='interpreter that has torch, transformers and parti-pytorch',
  )
  parser.add_argument('--json', metavar='FILE', help='write the numbers there')
  parser.add_argument('--system', choices=SYSTEMS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.system:
    work(args)
    return
  seconds = measure(args)
  count = args.batch_size * args.tokens
  print(
    f'{args.layers}+{args.layers} layers, width {args.width}, batch {args.batch_size}, '
    f'{args.tokens} tokens, float32'
  )
  for name, value in seconds.items():
    print(f'  {name:22} {value:8.3f} s  {count / value:8.0f} tokens/s')
  ratios = {
    f'{ours} / {theirs}': seconds[theirs] / seconds[ours]
    for ours, theirs in COMPARED
    if ours in seconds
  }
  for name, ratio in ratios.items():
    print(f'  {name}: {ratio:.1f}×')
  if args.json:
    with open(args.json, 'w', encoding='utf-8') as file:
      json.dump(
        {
          'layers': args.layers,
          'width': args.width,
          'batch_size': args.batch_size,
          'tokens': args.tokens,
          'seconds': seconds,
          'ratios': ratios,
        },
        file,
        indent=2,
      )


if __name__ == '__main__':
  main()
