"""Writes the names and shapes of the arrays in the published T5 models.

    python make_t5.py hugging_face    needs torch and transformers
    python make_t5.py t5x             needs t5x

makes t5_<format>.json: {model: {'layers': number, 'arrays': {name: shape}}}, where {} in a name
stands for each layer. Flan-T5 and T5 1.1 LM-adapted have the sizes of T5 v1.1.
"""

import collections
import json
import pathlib
import re
import sys

# Width, MLP width, layers, heads, head_dim: t5x/examples/t5/{t5_1_0,t5_1_1,mt5}/*.gin.
_V1_0 = {
  'small': (512, 2048, 6, 8, 64),
  'base': (768, 3072, 12, 12, 64),
  'large': (1024, 4096, 24, 16, 64),
  '3b': (1024, 16384, 24, 32, 128),
  '11b': (1024, 65536, 24, 128, 128),
}
_V1_1 = {
  'small': (512, 1024, 8, 6, 64),
  'base': (768, 2048, 12, 12, 64),
  'large': (1024, 2816, 24, 16, 64),
  'xl': (2048, 5120, 24, 32, 64),
  'xxl': (4096, 10240, 24, 64, 64),
}
# Prefix of the model -> sizes, rows of the table, and whether it has a gated MLP.
_FAMILIES = {
  't5-': (_V1_0, 32128, False),
  't5-v1_1-': (_V1_1, 32128, True),
  'mt5-': (_V1_1, 250112, True),
  'ul2': ({'': (4096, 16384, 32, 16, 256)}, 32128, True),
}


def _hugging_face(width, mlp_width, layers, heads, head_dim, rows, gated):
  import torch
  import transformers

  config = transformers.T5Config(
    vocab_size=rows,
    d_model=width,
    d_ff=mlp_width,
    num_layers=layers,
    num_heads=heads,
    d_kv=head_dim,
    feed_forward_proj='gated-gelu' if gated else 'relu',
    tie_word_embeddings=not gated,
  )
  with torch.device('meta'):
    model = transformers.T5ForConditionalGeneration(config)
  return {name: list(array.shape) for name, array in model.state_dict().items()}


def _t5x(width, mlp_width, layers, heads, head_dim, rows, gated):
  import flax.traverse_util
  import jax
  import jax.numpy as jnp
  from t5x.examples.t5 import network

  module = network.Transformer(
    network.T5Config(
      vocab_size=rows,
      emb_dim=width,
      num_heads=heads,
      num_encoder_layers=layers,
      num_decoder_layers=layers,
      head_dim=head_dim,
      mlp_dim=mlp_width,
      mlp_activations=('gelu', 'linear') if gated else ('relu',),
      logits_via_embedding=not gated,
    )
  )
  tokens = jnp.ones((1, 4), jnp.int32)
  init = lambda: module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)
  params = flax.traverse_util.flatten_dict(jax.eval_shape(init)['params'], sep='/')
  return {f'target/{name}': list(array.shape) for name, array in params.items()}


def _collapsed(arrays, layers):
  """Gives arrays that all layers have a single entry."""
  groups = collections.defaultdict(dict)
  for name, shape in arrays.items():
    template = re.sub(r'(block\.|layers_)\d+', r'\1{}', name)
    groups[template][name] = shape
  found = {}
  for template, group in groups.items():
    alike = len(group) == layers and len({str(shape) for shape in group.values()}) == 1
    found.update({template: group.popitem()[1]} if alike else group)
  return found


def main(kind):
  shapes = {'hugging_face': _hugging_face, 't5x': _t5x}[kind]
  manifest = {}
  for prefix, (sizes, rows, gated) in _FAMILIES.items():
    for name, (width, mlp_width, layers, heads, head_dim) in sizes.items():
      arrays = shapes(width, mlp_width, layers, heads, head_dim, rows, gated)
      manifest[prefix + name] = {'layers': layers, 'arrays': _collapsed(arrays, layers)}
  text = json.dumps(manifest, indent=1)
  text = re.sub(
    r'\[\s*(\d+),?\s*(\d*)\s*\]', lambda m: json.dumps([int(n) for n in m.groups() if n]), text
  )
  pathlib.Path(__file__).with_name(f't5_{kind}.json').write_text(text + '\n')


if __name__ == '__main__':
  main(sys.argv[1])
