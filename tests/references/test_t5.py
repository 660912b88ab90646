"""T5 encoders and their tokens against those of Hugging Face's transformers.

They need torch and transformers, and are skipped where these are not installed.
"""

import dataclasses
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from parti_jax.data import vocabulary
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import t5
from parti_jax.models import t5_encoder

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def _reference(folder, kind, whole, **settings):
  """Saves a model of transformers with random weights; returns its encoder."""
  config = getattr(transformers, f'{kind}Config')(
    vocab_size=41,
    d_model=24,
    d_ff=20,
    d_kv=6,
    num_layers=3,
    num_heads=5,
    **settings,
  )
  name = 'ForConditionalGeneration' if whole else 'EncoderModel'
  model = getattr(transformers, f'{kind}{name}')(config).eval()
  draw = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draw))
  if whole == 'torch':
    folder.mkdir()
    torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    config.save_pretrained(folder)
  else:
    model.save_pretrained(folder, max_shard_size='4KB' if whole == 'shards' else '1GB')
  return model.get_encoder()


@pytest.mark.parametrize(
  'kind, whole, settings',
  [
    ('T5', '', {'feed_forward_proj': 'relu'}),
    ('T5', 'torch', {'feed_forward_proj': 'relu', 'relative_attention_max_distance': 20}),
    ('T5', 'shards', {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}),
    ('T5', '', {'feed_forward_proj': 'gated-silu', 'relative_attention_num_buckets': 16}),
    ('MT5', '', {}),
    ('MT5', 'torch', {'tie_word_embeddings': False}),
  ],
)
def test_encoder(tmp_path, kind, whole, settings):
  reference = _reference(tmp_path / 'model', kind, whole, **settings)
  weights = files.open_weights([str(tmp_path / 'model')])
  assert whole != 'shards' or len(weights.files) > 1
  their_config = json.loads((tmp_path / 'model' / 'config.json').read_text())
  config = dataclasses.replace(t5.config_of(weights.arrays, their_config), dtype='float32')
  module = t5_encoder.T5Encoder(config)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *t5_encoder.example_inputs(config))
  expected = flax.traverse_util.flatten_dict(flax.linen.unbox(shapes['params']), sep='/')
  sources = t5.key_map(config, weights.arrays)
  expected = {name: array.shape for name, array in expected.items()}
  key_map.check(sources, weights.arrays, expected, 'the model', t5.IGNORED)
  params = jax.tree.map(np.asarray, key_map.convert(sources, weights.arrays))
  params = flax.traverse_util.unflatten_dict(params, sep='/')
  for length in (1, 37, 150):
    texts = np.random.default_rng(length).integers(1, 41, (4, length)).astype(np.int32)
    for text, kept in zip(texts, (length, 1, length // 2, 0)):
      text[kept:] = 0
    with torch.no_grad():
      whole_texts = torch.from_numpy(texts).long()
      output = reference(input_ids=whole_texts, attention_mask=(whole_texts > 0).long())
    found = jax.jit(module.apply)({'params': params}, jnp.asarray(texts))
    np.testing.assert_allclose(found, output.last_hidden_state.numpy(), atol=1e-4)


_SENTENCES = [
  'A portrait photo of a kangaroo wearing an orange hoodie and blue sunglasses.',
  'Ein Käfer, größer als ein Bär – „schön“ & grün!',
  'Фотография лисы в снегу, 1/200 с, f/2.8',
  'Μια γάτα δίπλα στη θάλασσα;',
  '草原上的一匹白马，旁边是红色的房子。',
  '東京タワーの前で踊るロボットのイラスト',
  '강아지가 공원에서 놀고 있다',
  'قطة بيضاء على سجادة حمراء',
  'एक हाथी पानी में नहा रहा है',
  'ภาพถ่ายของเรือในทะเล',
  'חתול שחור יושב על גג',
  'Ｆｕｌｌｗｉｄｔｈ ﬁne ½ ① ™',
  'emoji 🦊🏔️ and 👩‍👩‍👧 in a row',
  'tabs\tand  two spaces, a line\nbreak',
  'CamelCase_with_underscores and 3.14159e-10',
]


@pytest.fixture(scope='module')
def model_file(tmp_path_factory):
  """A SentencePiece model with T5's special ids and normalisation."""
  path = tmp_path_factory.mktemp('spiece') / 'spiece.model'
  with open(path, 'wb') as output:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(_SENTENCES * 20),
      model_writer=output,
      model_type='unigram',
      vocab_size=360,
      hard_vocab_limit=False,
      character_coverage=0.98,
      normalization_rule_name='nmt_nfkc',
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
    )
  return path


def _texts():
  """200 texts of several scripts, with words in other orders."""
  draw = np.random.default_rng(0)
  words = [word for sentence in _SENTENCES for word in sentence.split()]
  mixed = [' '.join(draw.choice(words, draw.integers(1, 12))) for _ in range(185)]
  return _SENTENCES + mixed


def test_tokens(model_file):
  ours = vocabulary.TextVocabulary(str(model_file))
  theirs = transformers.T5Tokenizer.from_pretrained(str(model_file.parent), extra_ids=0)
  unknown = 0
  for text in _texts():
    expected = theirs(text)['input_ids']
    assert ours.encode_whole(text) == expected, text
    unknown += expected.count(vocabulary.UNK_ID)
    padded = theirs(text, padding='max_length', truncation=True, max_length=9)['input_ids']
    assert ours.encode(text, 9)[0].tolist() == padded, text
  assert unknown
