"""The measurements of gpu.py: what each section measures, and what sums it up."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import inspect
import pathlib
import statistics
import sys
import time

import numpy as np

GUIDANCE_SCALE = 3.0
# Largest relative differences between a GPU and a CPU that count as equal. By default products of
# float32 round their operands to TensorFloat-32 on a GPU, and bfloat16 has 8 bits.
TOLERANCES = {'float32': 2e-3, 'bfloat16': 2e-2}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the command line sets.

  Attributes:
    model: a model folder for the sections `options` and `demo`; None for the demo model.
    small: whether to use tiny sizes, for a test on a CPU.
    repeats: number of timings, of which the median counts.
  """

  model: str | None = None
  small: bool = False
  repeats: int = 5

  def choose(self, usual, small):
    return small if self.small else usual


def model_config(settings: Settings, **changes):
  """Returns the sizes of 350M from its gin file, or tiny ones."""
  from parti_jax.core import gin_config
  from parti_jax.models import parti_config

  if settings.small:
    return tiny_config(**changes)
  gin_config.parse(['models/parti_350m.gin'], [], data=False)
  return dataclasses.replace(parti_config.PartiConfig(), **changes)


def tiny_config(**changes):
  from parti_jax.models import parti_config

  sizes = {
    'encoder_layers': 1,
    'decoder_layers': 2,
    'width': 16,
    'mlp_width': 32,
    'heads': 2,
    'text_vocabulary': 2048,
    'text_length': 16,
    'codebook_size': 32,
    'grid': (4, 4),
    'dtype': 'float32',
    'attention_patterns': ('conv',),
    'conv_kernel': 3,
    'remat': 'block_inputs',
  }
  return parti_config.PartiConfig(**sizes | changes)


def random_batch(config, size: int):
  """Returns texts of random lengths and images, int32 [size, text_length] and [size, image_length]."""
  draw = np.random.default_rng(0)
  texts = draw.integers(3, config.text_vocabulary, (size, config.text_length), np.int32)
  lengths = draw.integers(1, config.text_length + 1, (size, 1))
  texts = np.where(np.arange(config.text_length) < lengths, texts, 0)
  images = draw.integers(0, config.codebook_size, (size, config.image_length), np.int32)
  return texts, images


def timed(function, wait, repeats: int, calls: int = 1, warm_ups: int = 2) -> dict:
  """Returns seconds of a call: the median of `repeats` timings, and all of them."""
  for _ in range(warm_ups):
    wait(function())
  found = []
  for _ in range(max(repeats, 3)):
    begin = time.perf_counter()
    for _ in range(calls):
      result = function()
    wait(result)
    found.append((time.perf_counter() - begin) / calls)
  return {'seconds': statistics.median(found), 'all_seconds': found}


def torch_parti():
  """Returns the module with the PyTorch network, or None where PyTorch isn't installed."""
  if importlib.util.find_spec('torch') is None:
    return None
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  import torch_parti as found

  return found


WITHOUT_TORCH = {'skipped': 'PyTorch is not installed'}


# Losses: the same on a GPU and on a CPU.


def trainer_on(device, config):
  """Returns a trainer of a generator on one device, with AdamW."""
  from parti_jax.partitioning import mesh
  from parti_jax.training import optimizers
  from parti_jax.training import trainer
  from parti_jax.training.objectives import generator_objective

  objective = generator_objective.GeneratorObjective(config)
  made = mesh.make_mesh(devices=[device])
  return trainer.Trainer(objective, optimizers.adamw(lambda step: 1e-3), made)


def training_batch(trainer, config, size: int):
  texts, images = random_batch(config, size)
  return trainer.put(
    {
      'encoder_input_tokens': texts,
      'decoder_target_tokens': images,
      'decoder_loss_weights': np.ones(images.shape, np.float32),
    }
  )


def losses(settings: Settings, dtype: str) -> dict:
  """Trains a tiny Parti on the first device and on a CPU, with dropout, and compares the losses."""
  import jax

  # Heads of 8 and a layer of each kind: cuDNN's attention in bfloat16, and conv's own form.
  sizes = settings.choose({'grid': (8, 8), 'text_length': 64}, {})
  config = tiny_config(**sizes, attention_patterns=('global', 'conv'), dtype=dtype)
  devices = [jax.devices()[0], jax.devices('cpu')[0]]
  found = []
  for device in devices:
    trainer = trainer_on(device, config)
    state, batch = trainer.create_state(), training_batch(trainer, config, 8)
    found.append([])
    for _ in range(settings.choose(10, 2)):
      state, metrics = trainer.step(state, batch)
      found[-1].append(float(metrics['loss']))
  difference = float(np.max(np.abs(np.subtract(*found)) / np.abs(found[1])))
  return {
    'devices': [device.device_kind for device in devices],
    'losses': found,
    'difference': difference,
    'tolerance': TOLERANCES[dtype],
    'equal': difference <= TOLERANCES[dtype],
  }


def attention(settings: Settings) -> dict:
  """Attention and its gradients in bfloat16 on the first device, against float32 on a CPU."""
  import jax
  import jax.numpy as jnp

  from parti_jax.models.nn import attention_cudnn
  from parti_jax.models.nn import dot_product_attention

  length, text = settings.choose((1024, 128), (64, 64))
  counts = np.array([0, 1, text // 2, text])  # One text has no token.
  text_mask = (np.arange(text) < counts[:, None])[:, None, None]
  draw, errors, cudnn = np.random.default_rng(0), {}, {}
  for name, sizes, mask in (
    ('causal', (length, length, length), None),
    ('text', (text, text, text), text_mask),
    ('cross', (length, text, text), text_mask),
  ):
    inputs = [jnp.asarray(draw.normal(size=(4, size, 4, 64)), jnp.bfloat16) for size in sizes]
    cudnn[name] = attention_cudnn.fits(*inputs[:2])
    found = with_gradients(
      attention_cudnn.attend, inputs, mask, mask is None, 'cudnn' if cudnn[name] else 'xla'
    )
    with jax.default_device(jax.devices('cpu')[0]):
      exact = [jnp.asarray(np.asarray(part, np.float32)) for part in inputs]
      allowed = np.tri(length, dtype=bool) if mask is None else mask
      expected = with_gradients(dot_product_attention.attend, exact, allowed)
    errors[name] = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected)]
  worst = max(max(values) for values in errors.values())
  return {
    'cudnn': cudnn,
    'errors': errors,
    'difference': worst,
    'tolerance': TOLERANCES['bfloat16'],
    'equal': worst <= TOLERANCES['bfloat16'],
  }


def with_gradients(attend, inputs, mask, *others) -> list[np.ndarray]:
  """Returns the result of attention, and gradients of the sum of its cosine, as float32."""
  import jax
  import jax.numpy as jnp

  def loss(inputs, mask):
    out = attend(*inputs, mask, *others)
    return jnp.sum(jnp.cos(out.astype(jnp.float32))), out

  mask = None if mask is None else jnp.asarray(mask)
  gradients, out = jax.jit(jax.grad(loss, has_aux=True))(inputs, mask)
  return [np.asarray(part, np.float32) for part in (out, *gradients)]


# Training: model FLOP/s as a share of the GPU's peak.


def largest_batch(batches, measure, out_of_memory) -> dict:
  """Returns the measurement of the first batch size that fits into memory."""
  for size in batches:
    try:
      return {'batch_size': size, **measure(size)}
    except Exception as error:  # noqa: BLE001
      if not out_of_memory(error):
        raise
    gc.collect()  # The error held the arrays.
  return {'skipped': f'no batch of {", ".join(map(str, batches))} fits into memory'}


def batches_of(settings: Settings, remat: str):
  # Saving all activations takes several times the memory.
  return settings.choose((256, 128, 64, 32, 16) if remat != 'everything' else (64, 32, 16), (4,))


def training(settings: Settings, pattern: str, remat: str) -> dict:
  """A training step of parti_jax, with dropout and AdamW."""
  import jax

  from parti_jax.training import device_peak

  config = model_config(settings, attention_patterns=(pattern,), remat=remat)

  def measure(size):
    trainer = trainer_on(jax.devices()[0], config)
    batch, state = training_batch(trainer, config, size), trainer.create_state()

    def step():
      nonlocal state
      state, metrics = trainer.step(state, batch)
      return metrics['loss']

    return timed(step, jax.block_until_ready, settings.repeats, settings.choose(3, 1))

  def out_of_memory(error):
    return isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)

  found = largest_batch(batches_of(settings, remat), measure, out_of_memory)
  return found | {'peak': device_peak.device_peak(jax.devices()[0], config.compute_dtype)}


def torch_training(settings: Settings, pattern: str) -> dict:
  """The same step in PyTorch."""
  parti = torch_parti()
  if parti is None:
    return WITHOUT_TORCH
  config = model_config(settings, attention_patterns=(pattern,))

  def measure(size):
    step = parti.training_step(config, *random_batch(config, size))
    return timed(step, parti.wait, settings.repeats, settings.choose(3, 1))

  out_of_memory = lambda error: isinstance(error, parti.OutOfMemoryError)
  return largest_batch((128, 64, 32, 16, 8) if not settings.small else (4,), measure, out_of_memory)


def with_mfu(settings: Settings, found: dict) -> dict:
  """Adds MFU to the measurements of the section `training`, and the ratios to PyTorch."""
  from parti_jax.training.objectives import generator_objective

  peak = next((value['peak'] for value in found.values() if 'peak' in value), None)
  for name, value in found.items():
    if 'seconds' in value and peak:
      config = model_config(settings, attention_patterns=(name.split(', ')[1],))
      objective = generator_objective.GeneratorObjective(config)
      value['step_flops'] = objective.step_flops(value['batch_size'])
      value['mfu'] = value['step_flops'] / value['seconds'] / peak
  best = lambda system, pattern: max(
    (
      value.get('mfu', 0)
      for name, value in found.items()
      if name.startswith(f'{system}, {pattern}')
    ),
    default=0,
  )
  ratios = {
    pattern: best('parti_jax', pattern) / best('PyTorch', pattern)
    for pattern in ('conv', 'global')
    if best('PyTorch', pattern)
  }
  return {'measurements': found, 'ratios': ratios}


# Sampling: image tokens a second.


def random_params(config):
  """Returns random parameters of a generator, for `parameters.for_sampling`."""
  import flax.linen as nn
  import jax

  from parti_jax.models import parti

  init = jax.jit(parti.Parti(config).init)
  return nn.meta.unbox(init(jax.random.key(0), *parti.example_inputs(config))['params'])


def tokens_per_second(config, batch: int, found: dict) -> dict:
  return found | {
    'batch_size': batch,
    'tokens_per_second': batch * config.image_length / found['seconds'],
  }


def sampling(settings: Settings, batch: int) -> dict:
  """Sampling with guidance by parti_jax."""
  import jax
  import jax.numpy as jnp

  from parti_jax.sampling import decoding
  from parti_jax.sampling import parameters

  config = model_config(settings)
  params = parameters.for_sampling(config, random_params(config))

  @jax.jit
  def draw(params, texts, image_index):
    keys = decoding.image_keys(jnp.uint32(0), image_index)
    how = decoding.Sampling(GUIDANCE_SCALE, guided=True)
    return decoding.sample_tokens(config, params, texts, keys, how)

  texts = jnp.asarray(random_batch(config, batch)[0])
  call = lambda: draw(params, texts, jnp.arange(batch))
  found = timed(call, jax.block_until_ready, min(settings.repeats, 3), warm_ups=1)
  return tokens_per_second(config, batch, found)


def torch_sampling(settings: Settings, batch: int) -> dict:
  """The same in PyTorch."""
  parti = torch_parti()
  if parti is None:
    return WITHOUT_TORCH
  config = model_config(settings)
  sampler, texts = parti.sampler(config, batch, GUIDANCE_SCALE), random_batch(config, batch)[0]
  found = timed(lambda: sampler.draw(texts), parti.wait, min(settings.repeats, 3), warm_ups=1)
  return tokens_per_second(config, batch, found)


def with_sampling_ratios(settings: Settings, found: dict) -> dict:
  """Adds the ratios of tokens/s to those of PyTorch."""
  del settings
  rate = lambda system, batch: found.get(f'{system}, batch {batch}', {}).get('tokens_per_second')
  batches = dict.fromkeys(name.rsplit(' ', 1)[1] for name in found)
  ratios = {
    f'batch {batch}': rate('parti_jax', batch) / rate('PyTorch', batch)
    for batch in batches
    if rate('parti_jax', batch) and rate('PyTorch', batch)
  }
  return {'measurements': found, 'ratios': ratios}


# Options of sampling, and the demo.


def pictures_per_second(model, batch: int, repeats: int, **settings) -> dict:
  """Times `generate`, what `parti-jax generate` calls: sampling, and drawing the tokens."""
  call = lambda: model.generate(
    'red apple', num_images=batch, batch_size=batch, guidance_scale=GUIDANCE_SCALE, **settings
  )
  found = timed(call, lambda result: result, min(repeats, 3), warm_ups=1)
  return found | {'batch_size': batch, 'pictures_per_second': batch / found['seconds']}


def speculative(settings: Settings) -> dict:
  """Speculative decoding on and off, for single pictures of the demo model."""
  import parti_jax

  known = {field.name for field in dataclasses.fields(parti_jax.SamplingSettings)}
  if 'speculative_window' not in known:
    return {'skipped': 'not in this version'}
  model = parti_jax.load(settings.model)
  off, on = (
    pictures_per_second(model, 1, settings.repeats, speculative_window=window)
    for window in (0, settings.choose(8, 2))
  )
  return {'off': off, 'on': on, 'ratio': off['seconds'] / on['seconds']}


def int8_weights(settings: Settings, batch: int) -> dict:
  """int8 and float weights of the model of the section `sampling`, with random parameters."""
  import parti_jax

  if 'weights' not in inspect.signature(parti_jax.TextToImage).parameters:
    return {'skipped': 'not in this version'}
  found = {}
  for weights in ('float', 'int8'):
    model = parti_jax.TextToImage(random_model(settings), 'random', weights=weights)
    found[weights] = pictures_per_second(model, batch, settings.repeats)
    del model
    gc.collect()
  return {
    'off': found['float'],
    'on': found['int8'],
    'ratio': found['float']['seconds'] / found['int8']['seconds'],
  }


def random_model(settings: Settings):
  """Returns a model folder in memory with random parameters and a small image tokenizer."""
  import flax.linen as nn
  import jax

  from parti_jax.exported_model import model_folder
  from parti_jax.models import vit_vqgan
  from parti_jax.sampling import text_to_image

  config = model_config(settings)
  of_tokenizer = {f'{side}_layers': 1 for side in ('encoder', 'decoder')} | {
    f'{side}_width': 32 for side in ('encoder', 'decoder')
  }
  tokenizer = vit_vqgan.ViTVQGANConfig(
    image_size=8 * config.grid[0], codebook_size=config.codebook_size, **of_tokenizer
  )
  init = jax.jit(vit_vqgan.ViTVQGAN(tokenizer).init)
  params = init(jax.random.key(1), *vit_vqgan.example_inputs(tokenizer))['params']
  return dataclasses.replace(
    model_folder.load(settings.model or text_to_image.DEMO_FOLDER),
    generator_config=config,
    generator_params=random_params(config),
    tokenizer_config=tokenizer,
    tokenizer_params=nn.meta.unbox(params),
    parts={},
    made_with={},
  )


def demo(settings: Settings, batch: int) -> dict:
  """Pictures a second of the demo model."""
  import parti_jax

  return pictures_per_second(parti_jax.load(settings.model), batch, settings.repeats)


def as_measured(settings: Settings, found: dict) -> dict:
  del settings
  return {'measurements': found}


def sections(settings: Settings) -> dict:
  """Returns for each section its measurements, (function, arguments) by name, and what sums it up."""
  batches, large = settings.choose(((1, 16, 64), 64), ((1, 2), 2))
  both = [(pattern, 'block_inputs') for pattern in ('conv', 'global')]
  return {
    'losses': (
      {
        'tiny Parti, float32': (losses, {'dtype': 'float32'}),
        'tiny Parti, bfloat16': (losses, {'dtype': 'bfloat16'}),
        'attention, bfloat16': (attention, {}),
      },
      as_measured,
    ),
    'training': (
      {
        f'parti_jax, {pattern}, {remat}': (training, {'pattern': pattern, 'remat': remat})
        for pattern, remat in (*both, ('global', 'everything'))
      }
      | {f'PyTorch, {pattern}': (torch_training, {'pattern': pattern}) for pattern, _ in both},
      with_mfu,
    ),
    'sampling': (
      {
        f'{system}, batch {batch}': (function, {'batch': batch})
        for batch in batches
        for system, function in (('parti_jax', sampling), ('PyTorch', torch_sampling))
      },
      with_sampling_ratios,
    ),
    'options': (
      {
        'speculative decoding, demo, batch 1': (speculative, {}),
        'int8 weights, batch 1': (int8_weights, {'batch': 1}),
      },
      as_measured,
    ),
    'demo': ({f'demo, batch {large}': (demo, {'batch': large})}, as_measured),
  }


def describe() -> dict[str, str | None]:
  """Returns the device and the versions."""
  import jax

  versions = {'jax': jax.__version__, 'torch': None}
  if importlib.util.find_spec('torch'):
    import torch

    versions['torch'] = torch.__version__
  return {'device': jax.devices()[0].device_kind} | versions
