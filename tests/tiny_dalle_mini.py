"""A tiny DALL·E mini in the form of the published files: arrays, config.json, vocab.json, merges.txt."""

import json
import re

import flax.serialization
import flax.traverse_util
import numpy as np

CODES = 12
GRID = (4, 4)
SETTINGS = {
  'model_type': 'dallebart',
  'activation_function': 'gelu',
  'd_model': 16,
  'decoder_attention_heads': 2,
  'decoder_ffn_dim': 26,
  'decoder_layers': 2,
  'decoder_start_token_id': CODES,
  'encoder_attention_heads': 2,
  'encoder_ffn_dim': 26,
  'encoder_layers': 2,
  'encoder_vocab_size': 300,
  'image_length': GRID[0] * GRID[1],
  'image_vocab_size': CODES + 3,
  'ln_positions': 'normformer',
  'ln_type': 'layernorm',
  'max_text_length': 9,
  'tie_word_embeddings': False,
  'use_bias': False,
  'use_glu': True,
}
_MERGES = ('Ġ a', 'a n', 'Ġa n', 'c a', 'ca t', 'Ġ cat', 'e d', 'r ed', 'Ġ red', 't h', 'th e')

# dalle-mini's names -> min-dalle's.
_MIN_DALLE_NAMES = (
  (r'^model/\w+/', ''),
  (r'layers/FlaxBart\w+Layers/', 'layers/{}/'),
  (r'FlaxBartAttention_0', 'self_attn'),
  (r'FlaxBartAttention_1', 'encoder_attn'),
  (r'GLU_0/LayerNorm_', 'glu/ln'),
  (r'GLU_0/Dense_', 'glu/fc'),
  (r'LayerNorm_0', 'pre_self_attn_layer_norm'),
  (r'LayerNorm_1', 'self_attn_layer_norm'),
  (r'LayerNorm_2', 'pre_encoder_attn_layer_norm'),
  (r'LayerNorm_3', 'encoder_attn_layer_norm'),
  (r'(kernel|scale|embedding)$', 'weight'),
  (r'/', '.'),
)


def shapes(settings=SETTINGS):
  """{name: shape} of the arrays of a model with this config.json, as dalle-mini's code makes them."""
  width, rows = settings['d_model'], settings['image_vocab_size'] + 1
  found = {'lm_head/kernel': (width, rows)}
  for tower, name in (('encoder', 'Encoder'), ('decoder', 'Decoder')):
    start, mlp = f'model/{tower}', settings[f'{tower}_ffn_dim']
    vocabulary = settings['encoder_vocab_size'] if tower == 'encoder' else rows
    length = settings['max_text_length' if tower == 'encoder' else 'image_length']
    found[f'{start}/embed_tokens/embedding'] = (vocabulary, width)
    found[f'{start}/embed_positions/embedding'] = (length, width)
    found[f'{start}/layernorm_embedding/scale'] = (width,)
    found[f'{start}/layernorm_embedding/bias'] = (width,)
    found[f'{start}/final_ln/bias'] = (width,)
    layer = {}
    for place in range(1 if tower == 'encoder' else 2):
      layer[f'LayerNorm_{2 * place}/bias'] = (width,)
      layer[f'LayerNorm_{2 * place + 1}/scale'] = (width,)
      layer[f'LayerNorm_{2 * place + 1}/bias'] = (width,)
      for projection in ('q', 'k', 'v', 'out'):
        layer[f'FlaxBartAttention_{place}/{projection}_proj/kernel'] = (width, width)
    layer['GLU_0/LayerNorm_0/bias'] = (width,)
    layer['GLU_0/LayerNorm_1/bias'] = (mlp,)
    layer['GLU_0/Dense_0/kernel'] = layer['GLU_0/Dense_1/kernel'] = (width, mlp)
    layer['GLU_0/Dense_2/kernel'] = (mlp, width)
    for path, shape in layer.items():
      name_of_all = f'{start}/layers/FlaxBart{name}Layers/{path}'
      found[name_of_all] = (settings[f'{tower}_layers'], *shape)
  return found


def arrays(settings=SETTINGS, seed=0):
  """Random arrays of these names and shapes; no scale or bias has the value of a new network."""
  draw = np.random.default_rng(seed)
  found = {}
  for name, shape in shapes(settings).items():
    values = draw.normal(size=shape).astype(np.float32)
    small = name.endswith('bias') or 'kernel' in name
    found[name] = np.float32(0.3) * values if small else values
    if name.endswith('scale'):
      found[name] = 1 + np.float32(0.2) * values
  return found


def towers():
  """{'encoder': {name: array}, 'decoder': ...} as min-dalle has them."""
  found = {'encoder': {}, 'decoder': {}}
  for name, array in arrays().items():
    tower = 'encoder' if name.startswith('model/encoder') else 'decoder'
    theirs = name
    for pattern, replacement in _MIN_DALLE_NAMES:
      theirs = re.sub(pattern, replacement, theirs)
    change = np.transpose if name.endswith('kernel') else np.asarray
    for layer, part in enumerate(array if '{}' in theirs else [array]):
      found[tower][theirs.format(layer)] = np.ascontiguousarray(change(part))
  return found


def write_tokenizer(folder):
  """Writes vocab.json and merges.txt with all bytes and a few words."""
  # The letters of byte-level BPE: printable bytes stand for themselves, the others follow at 256.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  letters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
  tokens = ['<s>', '<pad>', '</s>', '<unk>', *letters]
  tokens += [merge.replace(' ', '') for merge in _MERGES]
  vocabulary = {token: place for place, token in enumerate(tokens)}
  vocabulary['<mask>'] = SETTINGS['encoder_vocab_size']  # As in the published mini, it has no row.
  (folder / 'vocab.json').write_text(json.dumps(vocabulary), encoding='utf-8')
  lines = ['#version: 0.2', *_MERGES, '']
  (folder / 'merges.txt').write_text('\n'.join(lines), encoding='utf-8')


def write(folder, settings=SETTINGS, seed=0, **changes):
  """Writes the files of a model; `changes` replace arrays, with '/' as '__', None to leave one out."""
  folder.mkdir(parents=True, exist_ok=True)
  found = arrays(settings, seed)
  for name, value in changes.items():
    found[name.replace('__', '/')] = value
  tree = {name: value for name, value in found.items() if value is not None}
  content = flax.serialization.msgpack_serialize(flax.traverse_util.unflatten_dict(tree, sep='/'))
  (folder / 'flax_model.msgpack').write_bytes(content)
  (folder / 'config.json').write_text(json.dumps(settings), encoding='utf-8')
  write_tokenizer(folder)
  return folder
