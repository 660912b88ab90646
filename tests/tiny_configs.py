"""The sizes of networks that several files of tests train, on pictures of 8×8."""

from parti_jax.models import coca
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.models import vqgan

TOKENIZER = vit_vqgan.ViTVQGANConfig(
  image_size=8,
  patch_size=4,
  encoder_layers=1,
  encoder_width=8,
  encoder_mlp_width=16,
  encoder_heads=2,
  decoder_layers=1,
  decoder_width=8,
  decoder_mlp_width=16,
  decoder_heads=2,
  codebook_size=6,
  code_dim=3,
  dtype='float32',
)

GENERATOR = parti_config.PartiConfig(
  encoder_layers=2,
  decoder_layers=2,
  width=16,
  mlp_width=32,
  heads=4,
  text_vocabulary=16,
  text_length=4,
  codebook_size=24,
  grid=(2, 2),
  dropout=0.3,
  dtype='float32',
)

RANKER = coca.CoCaConfig(
  image_size=8,
  patch_size=4,
  image_layers=1,
  unimodal_layers=1,
  multimodal_layers=1,
  width=8,
  mlp_width=16,
  heads=2,
  caption_queries=2,
  feature_dim=4,
  text_vocabulary=10,
  text_length=4,
  dtype='float32',
)
VQGAN = vqgan.VQGANConfig(
  image_size=8,
  channels=8,
  multipliers=(1, 2),
  res_blocks=1,
  decoder_res_blocks=1,
  middle_blocks=1,
  attention=False,
  z_channels=6,
  code_dim=4,
  codebook_size=16,
  norm_groups=4,
  output='pixels',
  dtype='float32',
)
# Quantizers of VQGAN -> what else they need.
QUANTIZERS = {
  'cosine': {},
  'euclidean': {},
  'dot': {},
  'fsq': {'fsq_levels': (4, 2, 2), 'code_dim': 3},
  'lfq': {},
}
