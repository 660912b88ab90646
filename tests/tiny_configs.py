"""The sizes of networks that several files of tests train, on pictures of 8×8."""

from parti_jax.models import vit_vqgan

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
