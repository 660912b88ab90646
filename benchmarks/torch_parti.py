"""Parti in PyTorch with the sizes of a PartiConfig, for comparison in gpu.py.

The network is that of `parti_jax.models.parti.Parti` with one attention pattern for all layers. It
uses what PyTorch has for speed: scaled_dot_product_attention, torch.compile, autocast to bfloat16,
fused AdamW, and for sampling a cache of fixed size and a CUDA graph of the step.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

OutOfMemoryError = torch.cuda.OutOfMemoryError
device = 'cuda' if torch.cuda.is_available() else 'cpu'


def _linear(inputs, outputs):
  return nn.Linear(inputs, outputs, bias=False)


def _norm(width):
  return nn.LayerNorm(width, eps=1e-6, bias=False)


def _split(x, parts, heads):
  """[batch, length, parts · width] to `parts` arrays [batch, heads, length, head_dim]."""
  return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _joined(x):
  return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
  def __init__(self, config):
    super().__init__()
    self.heads = config.heads
    self.project_in = _linear(config.width, 3 * config.width)
    self.project_out = _linear(config.width, config.width)

  def forward(self, x, mask, causal):
    parts = _split(self.project_in(x), 3, self.heads)
    out = F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal)
    return self.project_out(_joined(out))

  def step(self, x, cache, slot, visible):
    """Attends from one position, which it writes into the cache."""
    query, key, value = _split(self.project_in(x), 3, self.heads)
    keys, values = cache
    keys.index_copy_(2, slot, key)
    values.index_copy_(2, slot, value)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    return self.project_out(_joined(out))


class CrossAttention(nn.Module):
  def __init__(self, config):
    super().__init__()
    self.heads = config.heads
    self.project_query = _linear(config.width, config.width)
    self.project_memory = _linear(config.width, 2 * config.width)
    self.project_out = _linear(config.width, config.width)

  def keys_values(self, encoded):
    return _split(self.project_memory(encoded), 2, self.heads)

  def forward(self, x, keys_values, mask):
    (query,) = _split(self.project_query(x), 1, self.heads)
    out = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask)
    return self.project_out(_joined(out))


class MLP(nn.Module):
  def __init__(self, config):
    super().__init__()
    self.project_in = _linear(config.width, config.mlp_width)
    self.project_out = _linear(config.mlp_width, config.width)

  def forward(self, x):
    return self.project_out(F.gelu(self.project_in(x), approximate='tanh'))


class EncoderBlock(nn.Module):
  def __init__(self, config):
    super().__init__()
    self.attention_norm, self.mlp_norm = _norm(config.width), _norm(config.width)
    self.attention, self.mlp = SelfAttention(config), MLP(config)
    self.drop = nn.Dropout(config.dropout)

  def forward(self, x, mask):
    x = x + self.drop(self.attention(self.attention_norm(x), mask, False)).to(x.dtype)
    return x + self.drop(self.mlp(self.mlp_norm(x))).to(x.dtype)


class DecoderBlock(nn.Module):
  def __init__(self, config):
    super().__init__()
    self.attention_norm, self.cross_norm, self.mlp_norm = (_norm(config.width) for _ in range(3))
    self.attention, self.mlp = SelfAttention(config), MLP(config)
    self.cross_attention = CrossAttention(config)
    self.drop = nn.Dropout(config.dropout)

  def forward(self, x, encoded, text_mask, mask):
    attended = self.attention(self.attention_norm(x), mask, mask is None)
    text = self.cross_attention.keys_values(encoded)
    return self._after_self_attention(x, attended, text, text_mask)

  def step(self, x, cache, text, text_mask, slot, visible):
    attended = self.attention.step(self.attention_norm(x), cache, slot, visible)
    return self._after_self_attention(x, attended, text, text_mask)

  def _after_self_attention(self, x, attended, text, text_mask):
    x = x + self.drop(attended).to(x.dtype)
    x = x + self.drop(self.cross_attention(self.cross_norm(x), text, text_mask)).to(x.dtype)
    return x + self.drop(self.mlp(self.mlp_norm(x))).to(x.dtype)


class Parti(nn.Module):
  """Predicts image tokens from text and earlier image tokens.

  Args:
    config: a PartiConfig with Parti's own text encoder, one attention pattern, and the paper's blocks.
    dtype: dtype of the activations between blocks.
  """

  def __init__(self, config, dtype=torch.float32):
    super().__init__()
    assert config.text_encoder is None and len(config.patterns) == 1
    assert config.decoder_options == type(config.decoder_options)(), 'only blocks of the paper'
    self.config, self.dtype = config, dtype
    width, (rows, columns) = config.width, config.grid
    self.piece_embedding = nn.Embedding(config.text_vocabulary, width)
    self.text_position_embedding = nn.Embedding(config.text_length, width)
    self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
    self.encoder_norm = _norm(width)
    self.token_embedding = nn.Embedding(config.codebook_size, width)
    self.begin = nn.Parameter(torch.zeros(width))
    self.row_embedding = nn.Embedding(rows, width)
    self.column_embedding = nn.Embedding(columns, width)
    self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
    self.decoder_norm = _norm(width)
    self.logits = _linear(width, config.codebook_size)
    self.drop = nn.Dropout(config.dropout)
    for table in self.modules():
      if isinstance(table, nn.Embedding):
        nn.init.normal_(table.weight, std=0.02)
    (pattern,) = config.patterns
    mask = None if pattern.name == 'global' else torch.from_numpy(pattern.mask.copy())
    self.register_buffer('mask', mask, persistent=False)

  def encode(self, texts):
    """Returns encoded texts, and a mask that is True for text tokens."""
    mask = (texts > 0)[:, None, None]
    x = self.piece_embedding(texts) + self.text_position_embedding.weight
    x = self.drop(x.to(self.dtype))
    for block in self.encoder:
      x = block(x, mask)
    return self.encoder_norm(x), mask

  def embed(self, previous, position):
    """Returns the input of the first decoder layer for the tokens before each position."""
    x = torch.where((position == 0)[:, None], self.begin, self.token_embedding(previous))
    columns = self.config.grid[1]
    places = self.row_embedding(position // columns) + self.column_embedding(position % columns)
    return self.drop((x + places).to(self.dtype))

  def outputs(self, texts, images):
    """Returns the outputs of the last decoder layer, after its norm."""
    encoded, text_mask = self.encode(texts)
    places = torch.arange(images.shape[1], device=texts.device)
    x = self.embed(F.pad(images[:, :-1], (1, 0)), places)
    for block in self.decoder:
      x = block(x, encoded, text_mask, self.mask)
    return self.decoder_norm(x)

  def forward(self, texts, images):
    """Returns the logits of every image token."""
    return self.logits(self.outputs(texts, images))

  def loss_of(self, outputs, images):
    return F.cross_entropy(self.logits(outputs).flatten(0, 1).float(), images.flatten())

  def loss(self, texts, images):
    return self.loss_of(self.outputs(texts, images), images)


def training_step(config, texts, images):
  """Returns a function that takes an AdamW step on a batch and returns the loss.

  Args:
    config: a PartiConfig; in bfloat16 the step uses autocast.
    texts: int [batch, text_length], padded with 0.
    images: int [batch, image_length].
  """
  torch.set_float32_matmul_precision('high')
  reduced = config.dtype == 'bfloat16'
  model = Parti(config, torch.bfloat16 if reduced else torch.float32).to(device).train()
  if device == 'cuda':
    for block in (*model.encoder, *model.decoder):  # Blocks are alike: two of them are compiled.
      block.compile(dynamic=False)
    model.loss_of = torch.compile(model.loss_of, dynamic=False)
  optimizer = torch.optim.AdamW(
    model.parameters(), 1e-4, (0.9, 0.99), weight_decay=1e-4, fused=device == 'cuda'
  )
  texts, images = (
    torch.as_tensor(part, dtype=torch.int64, device=device) for part in (texts, images)
  )

  def step():
    with torch.autocast(device, torch.bfloat16, enabled=reduced):
      loss = model.loss(texts, images)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  return step


class Sampler:
  """Draws image tokens with guidance, with a cache of what the pattern lets a position see.

  On a GPU the step is compiled and captured as a CUDA graph, which is replayed for each token.

  Args:
    model: the network, in the dtype of the computation.
    batch: number of images.
    guidance_scale: weight of guidance.
  """

  def __init__(self, model, batch, guidance_scale):
    self.model, self.guidance_scale = model.eval(), guidance_scale
    config, (pattern,) = model.config, model.config.patterns
    length = config.image_length
    self.slots = pattern.num_slots(length)
    position, slot = np.arange(length)[:, None], np.arange(self.slots)
    held = position - (position - slot) % self.slots
    self.visible = torch.from_numpy((held >= 0) & pattern.visible(position, held)).to(device)
    shape = (2 * batch, config.heads, self.slots, config.width // config.heads)
    zeros = lambda: torch.zeros(shape, dtype=model.dtype, device=device)
    self.caches = [(zeros(), zeros()) for _ in model.decoder]
    self.position = torch.zeros(1, dtype=torch.int64, device=device)
    self.tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    self.previous = self.tokens[:, 0].clone()
    self.texts = self.text_mask = self.graph = None
    self._block = DecoderBlock.step
    if device == 'cuda':
      self._block = torch.compile(DecoderBlock.step, dynamic=False)

  @torch.no_grad()
  def draw(self, texts):
    """Draws image tokens [batch, image_length] for texts [batch, text_length]."""
    texts = torch.as_tensor(texts, dtype=torch.int64, device=device)
    empty = torch.zeros_like(texts)
    empty[:, 0] = 1  # The end of a text.
    self._set_texts(torch.cat([texts, empty]))
    if device == 'cuda' and self.graph is None:
      self._capture()
    self.position.zero_()
    for _ in range(self.tokens.shape[1]):
      if self.graph is None:
        self._step()
      else:
        self.graph.replay()
    return self.tokens

  def _set_texts(self, texts):
    encoded, mask = self.model.encode(texts)
    found = [block.cross_attention.keys_values(encoded) for block in self.model.decoder]
    if self.texts is None:
      self.texts = [tuple(part.contiguous() for part in parts) for parts in found]
      self.text_mask = mask
    for old, new in zip(self.texts, found):
      old[0].copy_(new[0])
      old[1].copy_(new[1])
    self.text_mask.copy_(mask)

  def _capture(self):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
      for _ in range(3):
        self._step()
    torch.cuda.current_stream().wait_stream(stream)
    self.graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(self.graph):
      self._step()

  def _step(self):
    """Samples the token at `position`, and advances it."""
    model, slot = self.model, self.position % self.slots
    visible = self.visible[self.position][:, None, None]
    x = model.embed(self.previous, self.position)[:, None].repeat(2, 1, 1)
    for block, cache, text in zip(model.decoder, self.caches, self.texts):
      x = self._block(block, x, cache, text, self.text_mask, slot, visible)
    conditional, unconditional = model.logits(model.decoder_norm(x))[:, 0].float().chunk(2)
    guided = unconditional + self.guidance_scale * (conditional - unconditional)
    noise = -torch.empty_like(guided).exponential_().log()
    token = (guided + noise).argmax(-1)
    self.tokens.index_copy_(1, self.position, token[:, None])
    self.previous.copy_(token)
    self.position.add_(1)


def sampler(config, batch, guidance_scale):
  """Returns a Sampler with random parameters, in the dtype of the config."""
  dtype = getattr(torch, config.dtype)
  return Sampler(Parti(config, dtype).to(device, dtype), batch, guidance_scale)


def wait(result):
  """Waits for the device; returns its argument."""
  if device == 'cuda':
    torch.cuda.synchronize()
  return result
