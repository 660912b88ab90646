"""Tiny generators of LlamaGen: files with random weights, and the formulas in NumPy."""

import numpy as np

CLASSES, CODES, GRID, LAYERS, WIDTH, HEADS, MLP_WIDTH = 5, 11, (3, 3), 2, 16, 2, 24
TEXT_LENGTH, FEATURES = 6, 12


def state(texts=False, seed=0, layers=LAYERS, width=WIDTH, mlp_width=MLP_WIDTH):
  """Random weights by the names of LlamaGen's files."""
  random = np.random.default_rng(seed)
  matrix = lambda *shape: (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
  scale = lambda: (1 + 0.2 * random.normal(size=width)).astype(np.float32)
  found = {
    'tok_embeddings.weight': matrix(CODES, width) * 4,
    'norm.weight': scale(),
    'output.weight': matrix(CODES, width) * 2,
  }
  if texts:
    found |= {
      'cls_embedding.uncond_embedding': matrix(TEXT_LENGTH, FEATURES) * 3,
      'cls_embedding.cap_proj.fc1.weight': matrix(width, FEATURES) * 2,
      'cls_embedding.cap_proj.fc2.weight': matrix(width, width) * 2,
    }
  else:
    found['cls_embedding.embedding_table.weight'] = matrix(CLASSES + 1, width) * 4
  for layer in range(layers):
    found |= {
      f'layers.{layer}.attention_norm.weight': scale(),
      f'layers.{layer}.attention.wqkv.weight': matrix(3 * width, width) * 1.5,
      f'layers.{layer}.attention.wo.weight': matrix(width, width),
      f'layers.{layer}.ffn_norm.weight': scale(),
      f'layers.{layer}.feed_forward.w1.weight': matrix(mlp_width, width),
      f'layers.{layer}.feed_forward.w3.weight': matrix(mlp_width, width),
      f'layers.{layer}.feed_forward.w2.weight': matrix(width, mlp_width),
    }
  return found


def _rms(x, weight):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _rotated(x, places):
  """Turns pairs of features (2k, 2k + 1); `places` has a row and a column, or None, for each vector."""
  head_dim = x.shape[-1]
  quarter = head_dim // 4
  turned = np.zeros_like(x)
  for at, place in enumerate(places):
    if place is None:
      continue  # A condition has no place: 0.
    for pair in range(head_dim // 2):
      coordinate = place[0] if pair < quarter else place[1]
      angle = coordinate * 10000.0 ** (-2 * (pair % quarter) / (head_dim / 2))
      first, second = x[..., at, 2 * pair], x[..., at, 2 * pair + 1]
      turned[..., at, 2 * pair] = first * np.cos(angle) - second * np.sin(angle)
      turned[..., at, 2 * pair + 1] = second * np.cos(angle) + first * np.sin(angle)
  return turned


def text_condition(weights, features):
  """The vectors of left-padded features, or of the learned ones if there is no text."""
  features = weights['cls_embedding.uncond_embedding'] if features is None else features
  hidden = _gelu(features @ weights['cls_embedding.cap_proj.fc1.weight'].T)
  return hidden @ weights['cls_embedding.cap_proj.fc2.weight'].T


def class_condition(weights, number):
  return weights['cls_embedding.embedding_table.weight'][[number]]


def logits(weights, condition, tokens, visible=None, heads=HEADS, grid=GRID):
  """Logits of the next token after the condition and after each of some image tokens, in float64.

  Args:
    weights: a result of `state`.
    condition: vectors before the image tokens.
    tokens: the first image tokens.
    visible: which vectors of the condition may be attended to; the others see only themselves.
    heads: number of attention heads.
    grid: rows and columns.
  """
  weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
  before = len(condition)
  x = np.concatenate([condition, weights['tok_embeddings.weight'][np.asarray(tokens, int)]])
  x = np.asarray(x, np.float64)
  length, width = x.shape
  places = [None] * before + [divmod(at, grid[1]) for at in range(length - before)]
  seen = np.tril(np.ones((length, length), bool))
  if visible is not None:
    seen[:, :before] &= np.asarray(visible, bool)
  seen |= np.eye(length, dtype=bool)
  layers = sum(name.endswith('.ffn_norm.weight') for name in weights)
  for layer in range(layers):
    of = lambda name, layer=layer: weights[f'layers.{layer}.{name}.weight']
    projected = _rms(x, of('attention_norm')) @ of('attention.wqkv').T
    query, key, value = (
      part.reshape(length, heads, -1).swapaxes(0, 1) for part in np.split(projected, 3, axis=-1)
    )
    query, key = _rotated(query, places), _rotated(key, places)
    scores = np.where(seen, query @ key.swapaxes(1, 2) / np.sqrt(width / heads), -np.inf)
    mass = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended = (mass / mass.sum(axis=-1, keepdims=True)) @ value
    x = x + attended.swapaxes(0, 1).reshape(length, width) @ of('attention.wo').T
    h = _rms(x, of('ffn_norm'))
    gate = h @ of('feed_forward.w1').T
    h = gate / (1 + np.exp(-gate)) * (h @ of('feed_forward.w3').T)
    x = x + h @ of('feed_forward.w2').T
  return (_rms(x, weights['norm.weight']) @ weights['output.weight'].T)[before - 1 :]


def greedy(weights, condition, other=None, scale=1.0, visible=None, grid=GRID):
  """The likeliest tokens one after another, with guidance if there is another condition."""
  tokens = []
  for _ in range(grid[0] * grid[1]):
    found = logits(weights, condition, tokens, visible)[-1]
    if other is not None:
      without = logits(weights, other, tokens, visible)[-1]
      found = without + scale * (found - without)
    tokens.append(int(np.argmax(found)))
  return tokens
