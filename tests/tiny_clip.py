"""A tiny CLIP and a tiny SigLIP with random weights, in files as the Hugging Face libraries write them."""

import json

import numpy as np
import safetensors.numpy

from parti_jax.importers import tokenizer_files

START, END = '<|startoftext|>', '<|endoftext|>'
MERGES = ['r e', 're d</w>', 'a p', 'b l', 'bl u', 'blu e</w>']
SIZE, PATCH, LENGTH = 10, 5, 24
IMAGE, TEXT = 8, 8  # Widths.


def alphabet():
  """Characters that stand for the 256 bytes in byte pairs, as GPT-2 defined them."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(256 - len(plain))]


def write_tokenizer(folder):
  """Writes the vocab.json and merges.txt of a small tokenizer of CLIP's kind; returns its size."""
  letters = alphabet()
  tokens = letters + [f'{letter}</w>' for letter in letters]
  tokens += [merge.replace(' ', '') for merge in MERGES] + [START, END]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *MERGES]) + '\n')
  (folder / 'tokenizer.json').write_bytes(tokenizer_files.of_clip(str(folder)))
  return len(tokens)


def _tower(prefix, width):
  shapes = {}
  for part in ('q', 'k', 'v', 'out'):
    shapes[f'self_attn.{part}_proj'] = (width, width)
  shapes |= {'mlp.fc1': (2 * width, width), 'mlp.fc2': (width, 2 * width)}
  shapes |= {'layer_norm1': (width,), 'layer_norm2': (width,)}
  return {
    f'{prefix}.encoder.layers.0.{name}.{last}': shape if last == 'weight' else shape[:1]
    for name, shape in shapes.items()
    for last in ('weight', 'bias')
  }


def clip_arrays(vocabulary, seed=0):
  """Random arrays of a CLIP, by the names of transformers."""
  patches = (SIZE // PATCH) ** 2
  vision, text = 'vision_model', 'text_model'
  shapes = {
    'logit_scale': (),
    'visual_projection.weight': (6, IMAGE),
    'text_projection.weight': (6, TEXT),
    f'{vision}.embeddings.class_embedding': (IMAGE,),
    f'{vision}.embeddings.patch_embedding.weight': (IMAGE, 3, PATCH, PATCH),
    f'{vision}.embeddings.position_embedding.weight': (patches + 1, IMAGE),
    f'{text}.embeddings.token_embedding.weight': (vocabulary, TEXT),
    f'{text}.embeddings.position_embedding.weight': (LENGTH, TEXT),
    **_tower(vision, IMAGE),
    **_tower(text, TEXT),
  }
  for name in (f'{vision}.pre_layrnorm', f'{vision}.post_layernorm', f'{text}.final_layer_norm'):
    shapes |= {f'{name}.weight': (IMAGE,), f'{name}.bias': (IMAGE,)}
  return _random(shapes, seed)


def open_clip_arrays(vocabulary, width=64, seed=0):
  """Random arrays of a CLIP, by the names of open_clip; wide enough that heads follow from it."""
  shapes = {
    'logit_scale': (),
    'text_projection': (width, 6),
    'positional_embedding': (LENGTH, width),
    'token_embedding.weight': (vocabulary, width),
    'ln_final.weight': (width,),
    'ln_final.bias': (width,),
    'visual.class_embedding': (width,),
    'visual.positional_embedding': ((SIZE // PATCH) ** 2 + 1, width),
    'visual.proj': (width, 6),
    'visual.conv1.weight': (width, 3, PATCH, PATCH),
  }
  for name in ('visual.ln_pre', 'visual.ln_post'):
    shapes |= {f'{name}.weight': (width,), f'{name}.bias': (width,)}
  for tower in ('', 'visual.'):
    block = f'{tower}transformer.resblocks.0'
    shapes |= {
      f'{block}.attn.in_proj_weight': (3 * width, width),
      f'{block}.attn.in_proj_bias': (3 * width,),
    }
    for name, rows, columns in (
      ('attn.out_proj', width, width),
      ('mlp.c_fc', 2 * width, width),
      ('mlp.c_proj', width, 2 * width),
    ):
      shapes |= {f'{block}.{name}.weight': (rows, columns), f'{block}.{name}.bias': (rows,)}
    for name in ('ln_1', 'ln_2'):
      shapes |= {f'{block}.{name}.weight': (width,), f'{block}.{name}.bias': (width,)}
  return _random(shapes, seed)


def siglip_arrays(vocabulary, seed=0):
  """Random arrays of a SigLIP, by the names of transformers."""
  vision, text, head = 'vision_model', 'text_model', 'vision_model.head'
  linear = lambda name, *shape: {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
  return _random(
    {
      'logit_scale': (1,),
      'logit_bias': (1,),
      **linear(f'{vision}.embeddings.patch_embedding', IMAGE, 3, PATCH, PATCH),
      f'{vision}.embeddings.position_embedding.weight': ((SIZE // PATCH) ** 2, IMAGE),
      f'{text}.embeddings.token_embedding.weight': (vocabulary, TEXT),
      f'{text}.embeddings.position_embedding.weight': (LENGTH, TEXT),
      **_tower(vision, IMAGE),
      **_tower(text, TEXT),
      **linear(f'{vision}.post_layernorm', IMAGE),
      **linear(f'{text}.final_layer_norm', TEXT),
      **linear(f'{text}.head', IMAGE, TEXT),
      f'{head}.probe': (1, 1, IMAGE),
      f'{head}.attention.in_proj_weight': (3 * IMAGE, IMAGE),
      f'{head}.attention.in_proj_bias': (3 * IMAGE,),
      **linear(f'{head}.attention.out_proj', IMAGE, IMAGE),
      **linear(f'{head}.layernorm', IMAGE),
      **linear(f'{head}.mlp.fc1', 2 * IMAGE, IMAGE),
      **linear(f'{head}.mlp.fc2', IMAGE, 2 * IMAGE),
    },
    seed,
  )


def _random(shapes, seed):
  draw = np.random.default_rng(seed)
  arrays = {}
  for name, shape in shapes.items():
    noise = draw.normal(size=shape).astype(np.float32)
    is_scale = name.endswith('weight') and ('norm' in name or 'ln_' in name)
    arrays[name] = np.asarray(is_scale + noise * (0.2 if is_scale else _spread(shape)), np.float32)
  return arrays


def write(folder, arrays, image_size=SIZE, model_type='clip', **text):
  """Writes model.safetensors and config.json; returns the first."""
  folder.mkdir(parents=True, exist_ok=True)
  heads = {'num_attention_heads': 2}
  config = {
    'model_type': model_type,
    'text_config': heads | text,
    'vision_config': heads | {'image_size': image_size},
  }
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors')
  return folder / 'model.safetensors'


def _spread(shape):
  return 0.6 if len(shape) < 2 else 1.7 / np.sqrt(shape[-1])
