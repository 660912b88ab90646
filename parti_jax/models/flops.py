"""Model FLOPs: the cost of the networks' matrix products, without recomputation.

A product of [m, k] and [k, n] counts as 2·m·k·n. Attention counts all pairs of positions (as in
PaLM, appendix B); a sparse pattern counts the keys in its neighborhood for each query. Norms,
softmax and embedding lookups are not counted. A training step costs three forward passes.

Those of a text encoder and of an image-token decoder take the config of Parti, or of another generator
whose blocks have the same projections, such as DALL·E mini.
"""

from __future__ import annotations

from typing import Any

from parti_jax.core import image_sizes
from parti_jax.models import clip
from parti_jax.models import coca
from parti_jax.models import discriminator
from parti_jax.models import lpips
from parti_jax.models import real_esrgan
from parti_jax.models import siglip
from parti_jax.models import super_resolution
from parti_jax.models import t5_encoder
from parti_jax.models import vit_vqgan
from parti_jax.models import vqgan


def encoder_forward(
  layers: int, width: int, mlp_width: int, length: int, mlp_kernels: int = 2
) -> int:
  """FLOPs of one sequence through an encoder stack."""
  projections = 2 * length * (4 * width**2 + mlp_kernels * width * mlp_width)
  return layers * (projections + 4 * length**2 * width)


def text_encoder_forward(config: Any) -> int:
  """FLOPs of one text through a generator's own text encoder."""
  return encoder_forward(
    config.encoder_layers, config.width, config.mlp_width, config.text_length, config.mlp_kernels
  )


def image_token_weights(config: Any) -> int:
  """Number of weights of one decoder layer that each image token is multiplied with."""
  width, keys_width = config.width, config.cached_heads * config.head_dim
  return 4 * width**2 + 2 * width * keys_width + config.mlp_kernels * width * config.mlp_width


def token_decoder_forward(config: Any) -> int:
  """FLOPs of one text's features and its image tokens through the image-token decoder."""
  width, text, image = config.width, config.text_length, config.image_length
  projections = 2 * image * image_token_weights(config)
  memory = 2 * text * 2 * config.cached_heads * config.head_dim * config.text_width
  attention = 4 * image * (_keys(config) + config.decoder_layers * text) * width
  return config.decoder_layers * (projections + memory) + attention + logits_forward(config)


def logits_forward(config: Any) -> int:
  """FLOPs of the logits of all image tokens of one sequence, from the output of one layer."""
  return 2 * config.image_length * config.width * config.codebook_size


def _keys(config: Any) -> int:
  """Number of image tokens that a query counts in all layers, including those that follow it."""
  repeated = config.decoder_layers // len(config.patterns)
  return repeated * sum(pattern.num_keys for pattern in config.patterns)


def parti_sampling_step(config: Any) -> int:
  """FLOPs of sampling the last image token of one sequence, with a cache of the previous ones."""
  width = config.width
  projections = 2 * image_token_weights(config)
  attention = 4 * (_keys(config) + config.decoder_layers * config.text_length) * width
  return config.decoder_layers * projections + attention + 2 * width * config.codebook_size


def vit_vqgan_forward(config: vit_vqgan.ViTVQGANConfig) -> int:
  """FLOPs of one picture through the encoder, the quantizer and the decoder of ViT-VQGAN."""
  length, patch = config.image_length, config.patch_size**2
  total = 2 * length * config.codebook_size * config.code_dim
  for channels, side in ((3, 'encoder'), (6, 'decoder')):
    width, mlp_width = getattr(config, f'{side}_width'), getattr(config, f'{side}_mlp_width')
    total += encoder_forward(getattr(config, f'{side}_layers'), width, mlp_width, length)
    total += (
      2 * length * (patch * channels * width + width * mlp_width + mlp_width * config.code_dim)
    )
  return total


def discriminator_forward(
  config: discriminator.DiscriminatorConfig, image_size: image_sizes.ImageSize
) -> int:
  """FLOPs of one picture through the discriminator."""
  width = config.width
  shorter, longer = sorted(image_sizes.sides(image_size))
  # Of the square with the shorter side.
  total = _convolution(shorter**2, 1, 3, width(shorter))
  for size in config.sizes(image_size):
    half = size // 2
    total += (
      _convolution(size**2, 3, width(size), width(size))
      + _convolution(half**2, 3, width(size), width(half))
      + _convolution(half**2, 1, width(size), width(half))
    )
  extra = 1 if config.minibatch_group > 1 else 0
  total += _convolution(half**2, 3, width(half) + extra, width(half))
  total += 2 * half * half * width(half) * width(half)
  return total * longer // shorter + 2 * width(half)


def vgg16_forward(image_size: image_sizes.ImageSize) -> int:
  """FLOPs of one picture through the convolutions of VGG16."""
  height, width = image_sizes.sides(image_size)
  total, channels = 0, 3
  for stage, widths in enumerate(lpips.VGG16):
    for features in widths:
      total += _convolution((height >> stage) * (width >> stage), 3, channels, features)
      channels = features
  return total


def _convolution(positions: int, kernel: int, channels: int, features: int) -> int:
  """FLOPs of a convolution with this number of positions, rows times columns, in its output."""
  return 2 * positions * kernel**2 * channels * features


def coca_forward(config: coca.CoCaConfig) -> int:
  """FLOPs of one picture and its text through a contrastive captioner."""
  width, mlp_width, patches = config.width, config.mlp_width, config.patches
  queries, text = config.caption_queries, config.text_length
  total = 2 * patches * 3 * config.patch_size**2 * width
  total += encoder_forward(config.image_layers, width, mlp_width, patches)
  for pooled in (1, queries):
    total += 4 * (patches + pooled) * width**2 + 4 * pooled * patches * width
  total += encoder_forward(config.unimodal_layers, width, mlp_width, text + 1)
  memory = 4 * queries * width**2
  projections = 2 * text * (6 * width**2 + 2 * width * mlp_width)
  total += config.multimodal_layers * (projections + memory + 4 * text * (text + queries) * width)
  return total + 2 * text * width * config.text_vocabulary + 4 * width * config.feature_dim


def super_resolution_forward(
  config: super_resolution.SuperResolutionConfig, height: int, width: int
) -> int:
  """FLOPs of one picture of height × width pixels through the super-resolution network."""
  wide, low = config.expansion * config.width, round(config.low_rank * config.width)
  block = (
    wide * (config.width + low) + 9 * low * config.width if low else 2 * 9 * wide * config.width
  )
  ends = 9 * 3 * config.unshuffle**2 * config.width * (1 + config.factor**2)
  positions = height * width // config.unshuffle**2
  return 2 * positions * (config.blocks * block + ends)


def rrdb_net_forward(config: real_esrgan.RRDBNetConfig, height: int, width: int) -> int:
  """FLOPs of one picture of height × width pixels through an RRDBNet."""
  features, growth, last = config.width, config.growth, real_esrgan.CONVOLUTIONS - 1
  dense = last * features * growth + last * (last - 1) // 2 * growth**2
  dense += (features + last * growth) * features
  blocks = config.blocks * real_esrgan.DENSE_BLOCKS * dense
  positions = height * width // config.unshuffle**2
  total = positions * (3 * config.unshuffle**2 * features + blocks + features**2)
  total += sum(positions * 4**place * features**2 for place in range(1, config.doublings + 1))
  total += height * width * config.factor**2 * (features + 3) * features
  return 2 * 9 * total


def srvgg_net_compact_forward(
  config: real_esrgan.SRVGGNetCompactConfig, height: int, width: int
) -> int:
  """FLOPs of one picture of height × width pixels through an SRVGGNetCompact."""
  ends = 3 * (1 + config.factor**2) * config.width
  return 2 * 9 * height * width * (config.layers * config.width**2 + ends)


def t5_encoder_forward(config: t5_encoder.T5EncoderConfig) -> int:
  """FLOPs of one text of the greatest length through a T5 encoder."""
  length, joined = config.text_length, config.heads * config.head_dim
  mlp = (3 if config.gated else 2) * config.width * config.mlp_width
  projections = 2 * length * (4 * config.width * joined + mlp)
  return config.layers * (projections + 4 * length**2 * joined)


def clip_text_forward(config: clip.CLIPTextConfig) -> int:
  """FLOPs of one text through CLIP's text encoder, without the projection of its vector."""
  return encoder_forward(config.layers, config.width, config.mlp_width, config.text_length)


def clip_forward(config: clip.CLIPConfig) -> int:
  """FLOPs of one picture and one text through CLIP."""
  width, patches = config.image_width, config.patches
  total = 2 * patches * 3 * config.patch_size**2 * width
  total += encoder_forward(config.image_layers, width, config.image_mlp_width, patches + 1)
  return (
    total + clip_text_forward(config.text) + 2 * (width + config.text_width) * config.feature_dim
  )


def siglip_forward(config: siglip.SigLIPConfig) -> int:
  """FLOPs of one picture and one text through SigLIP."""
  width, mlp_width, patches = config.image_width, config.image_mlp_width, config.patches
  total = 2 * patches * 3 * config.patch_size**2 * width
  total += encoder_forward(config.image_layers, width, mlp_width, patches)
  # The MAP head: keys and values of all patches, all else of one query.
  total += 4 * (patches + 1) * width**2 + 4 * patches * width + 4 * width * mlp_width
  total += encoder_forward(
    config.text_layers, config.text_width, config.text_mlp_width, config.text_length
  )
  return total + 2 * config.text_width * width


def vqgan_forward(config: vqgan.VQGANConfig, height: int, width: int) -> int:
  """FLOPs of one picture of height × width pixels through a VQGAN."""
  widths = [config.channels * multiplier for multiplier in config.multipliers]
  positions = [height * width >> 2 * level for level in range(len(widths))]
  last, codes = len(widths) - 1, config.code_dim
  products = lambda level, side, inputs, outputs: 2 * positions[level] * side**2 * inputs * outputs
  total = products(0, 3, 3, widths[0]) + products(
    0, 3, widths[0], 3 if config.output == 'pixels' else 6
  )
  if config.z_channels is None:
    total += products(last, 1, widths[last], codes) + products(last, 3, codes, widths[last])
  else:
    total += 2 * products(last, 3, widths[last], config.z_channels)
    total += 2 * products(last, 1, config.z_channels, codes)
  if config.quantizer not in ('fsq', 'lfq'):
    total += products(last, 1, codes, config.codebook_size)
  attentions = config.middle_attention * (config.middle_blocks - 1)
  total += 2 * _vqgan_blocks(
    positions[last], widths[last], widths[last], config.middle_blocks, attentions
  )
  for level, features in enumerate(widths):
    before, after = widths[max(level - 1, 0)], widths[min(level + 1, last)]
    for inputs, blocks in ((before, config.res_blocks), (after, config.decoder_res_blocks)):
      attentions = config.attention * blocks if level == last else 0
      total += _vqgan_blocks(positions[level], inputs, features, blocks, attentions)
    if level < last:
      total += products(level, 3, after, after)
      if config.downsampling == 'convolution':
        total += products(level + 1, 3, features, features)
  return total


def _vqgan_blocks(positions: int, inputs: int, features: int, blocks: int, attentions: int) -> int:
  """FLOPs of residual blocks of one resolution, and of self-attention after some of them."""
  convolutions = 9 * features * (inputs + (2 * blocks - 1) * features)
  shortcut = inputs * features if inputs != features else 0
  attention = 4 * features**2 + 2 * positions * features
  return 2 * positions * (convolutions + shortcut + attentions * attention)
