"""Model FLOPs against what XLA counts in the compiled forward pass."""

import jax
import pytest
import random_parameters

from parti_jax.models import discriminator
from parti_jax.models import flops
from parti_jax.models import image_tokenizers
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import t5_encoder
from parti_jax.models import vit_vqgan
from parti_jax.models import vqgan

BATCH = 2


def _counted_by_xla(module, inputs):
  variables = {'params': random_parameters.shapes(module, inputs)}
  compiled = jax.jit(module.apply).lower(variables, *inputs).compile()
  return compiled.cost_analysis()['flops']


def test_parti_forward_agrees_with_xla():
  # All layers laid out, since XLA counts the body of a loop once.
  sizes = parti_config.PartiConfig(
    encoder_layers=2,
    decoder_layers=3,
    width=128,
    mlp_width=256,
    heads=2,
    text_vocabulary=64,
    text_length=24,
    codebook_size=512,
    grid=(6, 8),
    dtype='float32',
    unroll=3,
  )
  counted = _counted_by_xla(parti.Parti(sizes), parti.example_inputs(sizes, BATCH))
  assert BATCH * parti.forward_flops(sizes) == pytest.approx(counted, rel=0.05)


def test_patterns_count_the_keys_of_their_neighborhood():
  sizes = parti_config.PartiConfig(attention_patterns=('conv', 'row', 'column', 'global'))
  other = parti_config.PartiConfig()
  fewer = 3 * (4 * 1024 - 121 - 33 - 32 - 1024)  # Keys of a query, in three rounds of four layers.
  assert parti.forward_flops(other) - parti.forward_flops(sizes) == 4 * 1024 * 1024 * fewer


def test_vit_vqgan_forward_agrees_with_xla():
  sizes = vit_vqgan.ViTVQGANConfig(
    image_size=48,
    patch_size=8,
    encoder_layers=2,
    encoder_width=128,
    encoder_mlp_width=256,
    encoder_heads=2,
    decoder_layers=3,
    decoder_width=192,
    decoder_mlp_width=512,
    decoder_heads=2,
    codebook_size=512,
    code_dim=32,
    dtype='float32',
    unroll=3,
  )
  counted = _counted_by_xla(vit_vqgan.ViTVQGAN(sizes), vit_vqgan.example_inputs(sizes, BATCH))
  assert BATCH * flops.vit_vqgan_forward(sizes) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'z_channels': None, 'attention': False, 'middle_attention': False, 'bias': False}
    | {'downsampling': 'average', 'shortcut': 'output', 'output': 'pixels', 'middle_blocks': 3},
  ],
)
def test_vqgan_forward_agrees_with_xla(changes):
  sizes = vqgan.VQGANConfig(
    image_size=64,
    channels=64,
    multipliers=(1, 2, 2),
    code_dim=16,
    codebook_size=256,
    dtype='float32',
    **({'z_channels': 24} | changes),
  )
  inputs = (jax.ShapeDtypeStruct((BATCH, 64, 96, 3), jax.numpy.float32),)
  counted = _counted_by_xla(vqgan.VQGAN(sizes), inputs)
  # XLA leaves out products with a convolution's margin.
  assert BATCH * flops.vqgan_forward(sizes, 64, 96) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize('changes', [{}, {'quantizer': 'lfq', 'code_dim': 8}])
def test_the_forward_flops_of_a_kind_are_those_of_images_of_its_size(changes):
  sizes = vqgan.VQGANConfig(
    **{
      'image_size': 128,
      'channels': 32,
      'multipliers': (1, 2, 2),
      'norm_groups': 8,
      'code_dim': 16,
      'codebook_size': 256,
      'attention': False,
      'middle_attention': False,
      'dtype': 'float32',
    }
    | changes
  )
  # Before compilation, which takes much longer here.
  module, inputs = vqgan.VQGAN(sizes), jax.eval_shape(lambda: vqgan.example_inputs(sizes, BATCH))
  variables = {'params': random_parameters.shapes(module, inputs)}
  counted = jax.jit(module.apply).lower(variables, *inputs).cost_analysis()['flops']
  found = image_tokenizers.training(sizes).forward_flops(sizes)
  assert BATCH * found == pytest.approx(counted, rel=0.02)


def test_a_training_step_of_the_20b_model_costs_six_flops_a_weight_and_token():
  # The rule of thumb, with attention and logits beside it.
  sizes = parti_config.PartiConfig(
    encoder_layers=16, decoder_layers=64, width=4096, mlp_width=16384, heads=64
  )
  weights = 64 * (8 * 4096**2 + 2 * 4096 * 16384)
  assert 3 * parti.forward_flops(sizes) == pytest.approx(6 * weights * 1024, rel=0.15)


def test_the_discriminators_forward_agrees_with_xla():
  sizes = discriminator.DiscriminatorConfig(channels=1024, max_channels=64)
  inputs = (jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jax.numpy.float32),)
  counted = _counted_by_xla(discriminator.Discriminator(sizes), inputs)
  # XLA leaves out products with a convolution's margin.
  assert BATCH * flops.discriminator_forward(sizes, 32) == pytest.approx(counted, rel=0.15)


def test_vgg16_costs_what_is_published():
  # 15.3 billion products and sums at 224 pixels, the three dense layers left out.
  assert flops.vgg16_forward(224) == pytest.approx(2 * 15.35e9, rel=0.01)


@pytest.mark.parametrize('activation', ['relu', 'gated_gelu'])
def test_t5_forward_agrees_with_xla(activation):
  sizes = t5_encoder.T5EncoderConfig(
    layers=2,
    width=128,
    mlp_width=192,
    heads=3,
    head_dim=48,
    text_vocabulary=64,
    text_length=64,
    activation=activation,
    dtype='float32',
    unroll=2,
  )
  counted = _counted_by_xla(t5_encoder.T5Encoder(sizes), t5_encoder.example_inputs(sizes, BATCH))
  assert BATCH * flops.t5_encoder_forward(sizes) == pytest.approx(counted, rel=0.05)
