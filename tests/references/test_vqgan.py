"""parti_jax.importers.vqgan and models.vqgan against other libraries, with random weights."""

import contextlib
import io
import re

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
taming_model = pytest.importorskip('taming.modules.diffusionmodules.model')
taming_quantize = pytest.importorskip('taming.modules.vqvae.quantize')

from parti_jax.importers import files  # noqa: E402
from parti_jax.importers import key_map  # noqa: E402
from parti_jax.importers import vqgan as importer  # noqa: E402
from parti_jax.models import vqgan  # noqa: E402


def _stirred(module, seed=0):
  """Moves all parameters, so that none has the value that its place in the file hardly changes."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  return module.eval()


def _taming(res_blocks=1, resolution=16, codes=64):
  """A small network of taming's parts: three levels, attention in the last."""
  torch.manual_seed(0)
  sizes = {
    'ch': 32,
    'out_ch': 3,
    'ch_mult': (1, 2, 2),
    'num_res_blocks': res_blocks,
    'attn_resolutions': [resolution // 4],
    'in_channels': 3,
    'resolution': resolution,
    'z_channels': 16,
    'double_z': False,
  }
  module = torch.nn.Module()
  with contextlib.redirect_stdout(io.StringIO()):
    module.encoder = taming_model.Encoder(**sizes)
    module.decoder = taming_model.Decoder(**sizes)
  module.quantize = taming_quantize.VectorQuantizer2(codes, 8, beta=0.25)
  module.quantize.embedding.weight.data.normal_()
  module.quant_conv = torch.nn.Conv2d(16, 8, 1)
  module.post_quant_conv = torch.nn.Conv2d(8, 16, 1)
  return _stirred(module)


def _images(low, high):
  """Images in [0, 1] with more columns than rows, and as torch's networks take them."""
  images = np.random.default_rng(0).uniform(size=(2, 16, 24, 3)).astype(np.float32)
  return jnp.asarray(images), torch.tensor(images).permute(0, 3, 1, 2) * (high - low) + low


def _rows(x):
  """[batch, channels, height, width] of torch to [batch, height, width, channels]."""
  return x.permute(0, 2, 3, 1).numpy()


def _encoded(module, images):
  with torch.no_grad():
    return module.quant_conv(module.encoder(images))


def _decoded(module, codes, low, high):
  """Images in [0, 1] of codes [batch, code_dim, rows, columns]."""
  with torch.no_grad():
    pixels = _rows(module.decoder(module.post_quant_conv(codes)))
  return np.clip((pixels - low) / (high - low), 0, 1)


def _imported(path, file_format):
  arrays = files.open_weights([str(path)]).arrays
  config = importer.config_of(arrays, file_format, image_size=16)
  sources = importer.key_map(config, arrays, file_format)
  key_map.check(
    sources, arrays, importer.expected(config), str(path), importer.ignored(arrays, file_format)
  )
  params = jax.tree.map(np.asarray, key_map.convert(sources, arrays))
  params = flax.traverse_util.unflatten_dict(params, sep='/')
  return vqgan.VQGAN(config), {'params': params}


def _compare(module, params, images, latents, tokens, pixels):
  apply = jax.jit(module.apply, static_argnames=('method', 'grid'))
  out = apply(params, images)
  np.testing.assert_allclose(out['latents'], latents.reshape(out['latents'].shape), atol=1e-4)
  np.testing.assert_array_equal(out['tokens'], tokens.reshape(out['tokens'].shape))
  assert len(np.unique(tokens)) > 10
  grid = module.config.grid_for(*images.shape[1:3])
  found = apply(params, out['tokens'], grid=grid, method='detokenize')
  np.testing.assert_allclose(found, pixels, atol=1e-4)
  assert np.std(pixels) > 0.05


def test_taming_gives_the_same_latents_tokens_and_pixels(tmp_path):
  theirs = _taming(res_blocks=2)
  torch.save({'state_dict': theirs.state_dict(), 'global_step': 3}, tmp_path / 'last.ckpt')
  module, params = _imported(tmp_path / 'last.ckpt', 'taming')
  images, scaled = _images(-1, 1)
  latents = _encoded(theirs, scaled)
  with torch.no_grad():
    codes, _, (_, _, tokens) = theirs.quantize(latents)
  _compare(module, params, images, _rows(latents), tokens.numpy(), _decoded(theirs, codes, -1, 1))


def _flax_name(name):
  """The name and layout in vqgan-jax's files of an array in taming's."""
  name = re.sub(r'(\w+)\.(\d+)', r'\1_\2', name)
  if name.startswith('quantize.'):
    return name.replace('weight', 'embedding')
  return name.replace('weight', 'scale' if 'norm' in name else 'kernel')


def test_dalle_minis_file_gives_the_same_tokens_and_pixels_between_0_and_1(tmp_path):
  theirs = _taming()
  flat = {
    _flax_name(name): array.numpy().transpose(2, 3, 1, 0) if array.ndim == 4 else array.numpy()
    for name, array in theirs.state_dict().items()
  }
  tree = flax.traverse_util.unflatten_dict(flat, sep='.')
  file = tmp_path / 'flax_model.msgpack'
  file.write_bytes(flax.serialization.msgpack_serialize(tree))
  module, params = _imported(file, 'dalle-mini')
  images, scaled = _images(0, 1)
  latents = _encoded(theirs, scaled)
  with torch.no_grad():
    codes, _, (_, _, tokens) = theirs.quantize(latents)
  _compare(module, params, images, _rows(latents), tokens.numpy(), _decoded(theirs, codes, 0, 1))


@pytest.mark.parametrize('averaged', [True, False])
def test_ibq_chooses_codes_by_dot_product_with_averaged_weights(tmp_path, averaged):
  theirs = _taming(res_blocks=2)
  state = theirs.state_dict()
  if averaged:
    average = {f'model_ema.{name.replace(".", "")}': array for name, array in state.items()}
    state = {name: torch.zeros_like(array) for name, array in state.items()} | average
    state |= {
      'model_ema.decay': torch.tensor(0.999),
      'model_ema.num_updates': torch.tensor(-1, dtype=torch.int32),
      'model_ema.lossdiscriminatormain0weight': torch.zeros(3),
    }
  state |= {'loss.discriminator.main.0.weight': torch.zeros(3)}
  torch.save({'state_dict': state}, tmp_path / 'imagenet256_16384.ckpt')
  module, params = _imported(tmp_path / 'imagenet256_16384.ckpt', 'ibq')
  images, scaled = _images(-1, 1)
  latents = _encoded(theirs, scaled)
  table = theirs.quantize.embedding.weight.detach()
  tokens = torch.einsum('bdhw,nd->bnhw', latents, table).argmax(dim=1)
  by_distance = theirs.quantize(latents)[2][2].reshape(tokens.shape)
  assert (tokens != by_distance).any()
  codes = table[tokens].permute(0, 3, 1, 2)
  _compare(module, params, images, _rows(latents), tokens.numpy(), _decoded(theirs, codes, -1, 1))


def _llamagen_name(name):
  """The name in LlamaGen's files of an array of transformers' JanusVQVAE."""
  for place, module in enumerate(('block_1', 'attn_1', 'block_2')):
    name = name.replace(f'.mid.{module}.', f'.mid.{place}.')
  return re.sub(
    r'\.(?:down|up)\.(\d+)\.(?:(block)|(attn|downsample|upsample))\.',
    lambda found: f'.conv_blocks.{found[1]}.{"res" if found[2] else found[3]}.',
    name,
  )


@pytest.mark.parametrize('multipliers', [(1, 1, 2), (1, 2)])
def test_llamagens_tokenizer_gives_the_same_tokens_and_pixels(tmp_path, multipliers):
  janus = pytest.importorskip('transformers.models.janus')
  torch.manual_seed(0)
  config = janus.JanusVQVAEConfig(
    embed_dim=4,
    num_embeddings=64,
    latent_channels=16,
    base_channels=32,
    channel_multiplier=list(multipliers),
    num_res_blocks=2,
    num_patches=4,
  )
  theirs = janus.modeling_janus.JanusVQVAE(config)
  theirs.quantize.embedding.weight.data.normal_()
  _stirred(theirs)
  state = {_llamagen_name(name): array for name, array in theirs.state_dict().items()}
  state['quantize.codebook_used'] = torch.zeros(65536)
  torch.save({'model': state}, tmp_path / 'vq_ds16_c2i.pt')
  module, params = _imported(tmp_path / 'vq_ds16_c2i.pt', 'llamagen')
  images, scaled = _images(-1, 1)
  latents = _encoded(theirs, scaled)
  # LlamaGen compares unit vectors; transformers' port does so with the codes alone.
  unit = torch.nn.functional.normalize
  table = unit(theirs.quantize.embedding.weight.detach(), dim=-1)
  tokens = torch.einsum('bdhw,nd->bnhw', unit(latents, dim=1), table).argmax(dim=1)
  codes = table[tokens].permute(0, 3, 1, 2)
  _compare(module, params, images, _rows(latents), tokens.numpy(), _decoded(theirs, codes, -1, 1))
  # Their own decoder of tokens, for the square that it is made for.
  square = tokens[:, :4, :4].reshape(2, 16)
  with torch.no_grad():
    pixels = _rows(theirs.decode(square))
  found = jax.jit(lambda tokens: module.apply(params, tokens, (4, 4), method='detokenize'))(
    jnp.asarray(square.numpy(), jnp.int32)
  )
  np.testing.assert_allclose(found, np.clip((pixels + 1) / 2, 0, 1), atol=1e-4)
