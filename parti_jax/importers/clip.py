"""Reads CLIP's weights by the names of transformers and of open_clip.

| weights | layout | activation |
|---|---|---|
| openai/clip-vit-*, PickScore, the text encoders of diffusion models | transformers | in config.json |
| LAION's ViT-H-14 and others, HPSv2, HPSv2.1 | open_clip | 'gelu', unless its name says quickgelu |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.exported_model import preprocessing
from parti_jax.importers import clip_names
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import clip

_DEFAULT = clip_names.Processor(preprocessing.Preprocessing(), clip.PIXEL_MEAN, clip.PIXEL_STD)
# Arrays that are not parameters: position ids, masks and the state of training.
IGNORED = (
  r'(.*\.)?embeddings\.position_ids',
  r'(.*\.)?attn_mask',
  r'(optimizer|scaler|optimizer_states|loops)\..*',
  'input_resolution',
  'context_length',
  'vocab_size',
)
# Arrays that the text encoder alone doesn't need: those of the rest of CLIP too.
IGNORED_BY_TEXT = (
  *IGNORED,
  r'(.*\.)?(vision_model|visual)\..*',
  r'(.*\.)?(visual_projection|text_projection)(\.weight)?',
  r'(.*\.)?logit_scale',
)
_EPSILON = 1e-5
# Width of an image encoder -> width of a head that isn't 64: ViT-H, ViT-g, ViT-bigG, ViT-e.
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
_ACTIVATIONS = {
  'quick_gelu': 'quick_gelu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
# Supported values in an open_clip config; others belong to other networks.
_OPEN_CLIP_IMAGE = {'image_size', 'layers', 'width', 'head_width', 'patch_size', 'mlp_ratio'}
_OPEN_CLIP_TEXT = {'context_length', 'vocab_size', 'width', 'heads', 'layers'}


class _Layout(NamedTuple):
  """The array names of one library; `{}` stands for a layer.

  Attributes:
    image: names of the image encoder's patches, positions, and first layers of MLPs.
    text: the same names of the text encoder, with tokens for patches, without `_Names.of_text`.
    projection: name of the projection to the picture's vector.
    feature_axis: axis of features in the projection.
  """

  image: tuple[str, str, str]
  text: tuple[str, str, str]
  projection: str
  feature_axis: int


_TRANSFORMERS = _Layout(
  (
    'vision_model.embeddings.patch_embedding.weight',
    'vision_model.embeddings.position_embedding.weight',
    'vision_model.encoder.layers.{}.mlp.fc1.weight',
  ),
  (
    'embeddings.token_embedding.weight',
    'embeddings.position_embedding.weight',
    'encoder.layers.{}.mlp.fc1.weight',
  ),
  'visual_projection.weight',
  0,
)
_OPEN_CLIP = _Layout(
  (
    'visual.conv1.weight',
    'visual.positional_embedding',
    'visual.transformer.resblocks.{}.mlp.c_fc.weight',
  ),
  (
    'token_embedding.weight',
    'positional_embedding',
    'transformer.resblocks.{}.mlp.c_fc.weight',
  ),
  'visual.proj',
  1,
)


class _Names(NamedTuple):
  """The array names of a file.

  Attributes:
    layout: names of the library that wrote the file.
    prefix: prefix of all names, such as 'state_dict.'.
    of_text: prefix of the text encoder's names: `prefix` and 'text_model.'; in open_clip only
      `prefix`, or `prefix` and 'text.' in the newer of its two forms.
  """

  layout: _Layout
  prefix: str
  of_text: str


class _Said(NamedTuple):
  """Facts that a config states and array shapes don't show; None for those it doesn't state."""

  image_size: int | None = None
  image_heads: int | None = None
  text_heads: int | None = None
  end_id: int | None = None
  activation: str | None = None


def config_of(
  arrays: clip_names.Arrays,
  settings: Mapping[str, Any] | None = None,
  processor: Mapping[str, Any] | None = None,
  activation: str | None = None,
) -> clip.CLIPConfig:
  """Returns the config of a CLIP, from the shapes of its arrays and from its own config.

  Args:
    arrays: {name: array in the file}.
    settings: contents of its config.json (transformers) or open_clip_config.json; None if there is
      none. The numbers of heads then follow from the widths, as in the published models.
    processor: contents of its preprocessor_config.json; None for the mean and deviation of an
      open_clip_config.json, or of OpenAI's pictures.
    activation: name in `clip_layers.ACTIVATIONS`, used if the config doesn't state it.

  Raises:
    UserError: if arrays are missing or contradict the config, the activation isn't known, or the
      config asks for something that is not supported.
  """
  names = _names(arrays)
  said = _said(settings)
  patches, positions, mlp = (names.prefix + name for name in names.layout.image)
  width, _, patch_size, _ = clip_names.shape(arrays, patches, 4)
  side = clip_names.grid(clip_names.shape(arrays, positions, 2)[0] - 1, positions)
  size = clip_names.image_size(said.image_size, patch_size, side)
  prepared = clip_names.read_processor(_processor(settings, processor), size, _DEFAULT)
  features = clip_names.shape(arrays, names.prefix + names.layout.projection, 2)
  text = _text_sizes(arrays, names, said)
  found = clip.CLIPConfig(
    image_size=size,
    patch_size=patch_size,
    image_layers=clip_names.count_layers(arrays, mlp),
    image_width=width,
    image_mlp_width=clip_names.shape(arrays, mlp.format(0), 2)[0],
    image_heads=said.image_heads or _heads(width, _HEAD_WIDTHS.get(width, 64)),
    text_vocabulary=text['text_vocabulary'],
    text_length=text['text_length'],
    text_layers=text['layers'],
    text_width=text['width'],
    text_mlp_width=text['mlp_width'],
    text_heads=text['heads'],
    end_id=text['end_id'],
    feature_dim=features[names.layout.feature_axis],
    activation=_activation(said, activation),
    pixel_mean=prepared.mean,
    pixel_std=prepared.std,
  )
  _check_sizes(settings, found.text, found)
  return found


def text_config_of(
  arrays: clip_names.Arrays,
  settings: Mapping[str, Any] | None = None,
  activation: str | None = None,
) -> clip.CLIPTextConfig:
  """Returns the config of CLIP's text encoder.

  Args:
    arrays: {name: array in the file}, of a whole CLIP or of its text encoder alone.
    settings: contents of its config.json, of either.
    activation: the argument of `config_of`.

  Raises:
    UserError: in the cases of `config_of`.
  """
  said = _said(settings)
  sizes = _text_sizes(arrays, _text_names(arrays), said)
  found = clip.CLIPTextConfig(**sizes, activation=_activation(said, activation))
  _check_sizes(settings, found)
  return found


def preprocessing_of(
  arrays: clip_names.Arrays,
  sizes: clip.CLIPConfig,
  settings: Mapping[str, Any] | None = None,
  processor: Mapping[str, Any] | None = None,
) -> preprocessing.Preprocessing:
  """Returns how a CLIP's pictures are resized and cropped.

  HPSv2's weights look like open_clip's ViT-H-14; they don't show that its pictures are padded,
  `Preprocessing(fit='pad')`.

  Args:
    arrays: {name: array in the file}.
    sizes: the result of `config_of`.
    settings: the argument of `config_of`.
    processor: the argument of `config_of`.

  Raises:
    UserError: if the file asks for something that is not supported.
  """
  found = _processor(settings, processor)
  if not found and _names(arrays).layout is _OPEN_CLIP:
    return preprocessing.Preprocessing(crop_rounding='even')
  return clip_names.read_processor(found, sizes.image_size, _DEFAULT).how


def layout(arrays: clip_names.Arrays) -> str:
  """Whose names a file has: 'transformers' or 'open_clip'.

  Raises:
    UserError: if they are not CLIP's.
  """
  return 'transformers' if _names(arrays).layout is _TRANSFORMERS else 'open_clip'


def key_map(config: clip.CLIPConfig, arrays: clip_names.Arrays) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of `clip.CLIP`.

  Args:
    config: the result of `config_of`.
    arrays: {name: array in the file}.
  """
  names = _names(arrays)
  start = names.prefix
  if names.layout is _TRANSFORMERS:
    theirs, positions = 'vision_model.', 'embeddings.position_embedding.weight'
    patches, class_embedding = 'embeddings.patch_embedding.weight', 'embeddings.class_embedding'
    norms = 'pre_layrnorm', 'post_layernorm'
    layers = clip_names.transformers_layers
    stack = 'encoder.layers'
    projections = {
      'image_projection/kernel': key_map_lib.one(
        f'{start}visual_projection.weight', key_map_lib.linear
      ),
      'text_projection/kernel': key_map_lib.one(
        f'{start}text_projection.weight', key_map_lib.linear
      ),
    }
  else:
    theirs, positions = 'visual.', 'positional_embedding'
    patches, class_embedding = 'conv1.weight', 'class_embedding'
    norms = 'ln_pre', 'ln_post'
    layers = _open_clip_layers
    stack = 'transformer.resblocks'
    projections = {
      'image_projection/kernel': key_map_lib.one(f'{start}visual.proj'),
      'text_projection/kernel': key_map_lib.one(f'{names.of_text}text_projection'),
    }
  theirs = start + theirs
  return {
    'log_scale': key_map_lib.one(f'{start}logit_scale', lambda array: array.reshape(())),
    'image_encoder/class_embedding': key_map_lib.one(theirs + class_embedding),
    'image_encoder/patch_embedding/kernel': key_map_lib.one(theirs + patches, clip_names.patches),
    'image_encoder/position_embedding/table': key_map_lib.one(theirs + positions),
    **clip_names.norm('image_encoder/pre_norm', theirs + norms[0]),
    **clip_names.norm('image_encoder/post_norm', theirs + norms[1]),
    **layers(
      'image_encoder/transformer/layers',
      theirs + stack,
      config.image_layers,
      config.image_heads,
    ),
    **projections,
    **_text_key_map(names, config.text, 'text_encoder/'),
  }


def text_key_map(config: clip.CLIPTextConfig, arrays: clip_names.Arrays) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of `clip.CLIPTextEncoder`.

  Args:
    config: the result of `text_config_of`.
    arrays: {name: array in the file}, of a whole CLIP or of its text encoder alone.
  """
  return _text_key_map(_text_names(arrays), config, '')


def _names(arrays: clip_names.Arrays) -> _Names:
  """Returns the names of the library that wrote a file.

  Raises:
    UserError: if they are not CLIP's.
  """
  start = clip_names.prefix(arrays, _TRANSFORMERS.image[0])
  if start is not None:
    return _Names(_TRANSFORMERS, start, f'{start}text_model.')
  start = clip_names.prefix(arrays, _OPEN_CLIP.image[0])
  if start is not None:
    apart = f'{start}text.{_OPEN_CLIP.text[0]}' in arrays
    return _Names(_OPEN_CLIP, start, f'{start}text.' if apart else start)
  raise UserError(
    f"these aren't the arrays of a CLIP: neither {_TRANSFORMERS.image[0]} (transformers) nor "
    f'{_OPEN_CLIP.image[0]} (open_clip) is among them'
  )


def _text_names(arrays: clip_names.Arrays) -> _Names:
  """Returns the names of a file that may hold the text encoder alone.

  Newer releases of transformers then omit 'text_model.' from the names.
  """
  start = clip_names.prefix(arrays, _TRANSFORMERS.text[0])
  return _names(arrays) if start is None else _Names(_TRANSFORMERS, start, start)


def _text_sizes(arrays: clip_names.Arrays, names: _Names, said: _Said) -> dict[str, Any]:
  """Returns the fields of CLIPTextConfig that are sizes."""
  tokens, positions, mlp = (names.of_text + name for name in names.layout.text)
  vocabulary, width = clip_names.shape(arrays, tokens, 2)
  return {
    'text_vocabulary': vocabulary,
    'text_length': clip_names.shape(arrays, positions, 2)[0],
    'layers': clip_names.count_layers(arrays, mlp),
    'width': width,
    'mlp_width': clip_names.shape(arrays, mlp.format(0), 2)[0],
    'heads': said.text_heads or _heads(width, 64),
    # The end of a text is the last token of CLIP's vocabulary.
    'end_id': said.end_id or vocabulary - 1,
  }


def _text_key_map(
  names: _Names, config: clip.CLIPTextConfig, ours: str
) -> dict[str, key_map_lib.Source]:
  tokens, positions, _ = (names.of_text + name for name in names.layout.text)
  if names.layout is _TRANSFORMERS:
    layers, stack = clip_names.transformers_layers, 'encoder.layers'
    norm = 'final_layer_norm'
  else:
    layers, stack, norm = _open_clip_layers, 'transformer.resblocks', 'ln_final'
  return {
    f'{ours}token_embedding/table': key_map_lib.one(tokens),
    f'{ours}position_embedding/table': key_map_lib.one(positions),
    **clip_names.norm(f'{ours}norm', names.of_text + norm),
    **layers(f'{ours}transformer/layers', names.of_text + stack, config.layers, config.heads),
  }


def _open_clip_layers(
  ours: str, theirs: str, count: int, heads: int
) -> dict[str, key_map_lib.Source]:
  """Returns what `clip_names.transformers_layers` does; query, key and value are one array."""
  block = theirs + '.{}'
  found: dict[str, key_map_lib.Source] = {}
  for place, part in enumerate(('query', 'key', 'value')):
    found |= {
      f'{ours}/attention/{part}/kernel': key_map_lib.layers(
        f'{block}.attn.in_proj_weight', count, clip_names.fused(place, clip_names.to_heads(heads))
      ),
      f'{ours}/attention/{part}/bias': key_map_lib.layers(
        f'{block}.attn.in_proj_bias', count, clip_names.fused(place, clip_names.split_bias(heads))
      ),
    }
  stacked = clip_names.stacked
  return (
    found
    | stacked(
      f'{ours}/attention/out', f'{block}.attn.out_proj', count, clip_names.from_heads(heads)
    )
    | stacked(f'{ours}/attention_norm', f'{block}.ln_1', count, last='scale')
    | stacked(f'{ours}/mlp_norm', f'{block}.ln_2', count, last='scale')
    | stacked(f'{ours}/mlp/project_in', f'{block}.mlp.c_fc', count)
    | stacked(f'{ours}/mlp/project_out', f'{block}.mlp.c_proj', count)
  )


def _heads(width: int, head_width: int) -> int:
  if width % head_width:
    raise UserError(
      f'an encoder of width {width} is none of the published ones, so that its attention heads '
      "aren't known; give its config.json"
    )
  return width // head_width


def _activation(said: _Said, activation: str | None) -> str:
  if activation is None and said.activation is None:
    raise UserError(
      "the arrays don't say whether the activation is 'quick_gelu' (OpenAI, DFN, MetaCLIP) or "
      "'gelu' (LAION, HPSv2); give its config.json, or say which"
    )
  if activation and said.activation and activation != said.activation:
    raise UserError(
      f'the config says the activation {said.activation!r}, and not {activation!r}; give the config '
      'of these weights, or leave the activation to it'
    )
  return activation or said.activation or ''


def _processor(
  settings: Mapping[str, Any] | None, processor: Mapping[str, Any] | None
) -> Mapping[str, Any]:
  """Returns the preprocessing: a file of its own, or a part of open_clip's config."""
  return processor or clip_names.section(settings or {}, 'preprocess_cfg')


def _check_sizes(
  settings: Mapping[str, Any] | None,
  text: clip.CLIPTextConfig,
  whole: clip.CLIPConfig | None = None,
):
  """Raises UserError unless the sizes that a config states are those of the arrays."""
  if settings is None:
    return
  model = _model(settings)
  if 'vision_cfg' in model:
    sections, features = ('text_cfg', 'vision_cfg'), 'embed_dim'
    length, vocabulary, layers, width = 'context_length', 'vocab_size', 'layers', 'width'
  else:
    sections, features = ('text_config', 'vision_config'), 'projection_dim'
    length, vocabulary = 'max_position_embeddings', 'vocab_size'
    layers, width = 'num_hidden_layers', 'hidden_size'
  alone = model.get('model_type') == 'clip_text_model'
  clip_names.check_sizes(
    model if alone else clip_names.section(model, sections[0]),
    {
      length: text.text_length,
      vocabulary: text.text_vocabulary,
      layers: text.layers,
      width: text.width,
      'intermediate_size': text.mlp_width,
    },
  )
  if whole is not None and not alone:
    clip_names.check_sizes(model, {features: whole.feature_dim})
    clip_names.check_sizes(
      clip_names.section(model, sections[1]),
      {
        'patch_size': whole.patch_size,
        layers: whole.image_layers,
        width: whole.image_width,
        'intermediate_size': whole.image_mlp_width,
      },
    )


def _model(settings: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the part of a config about the network; open_clip's files have others, too."""
  return clip_names.section(settings, 'model_cfg') if 'model_cfg' in settings else settings


def _said(settings: Mapping[str, Any] | None) -> _Said:
  if settings is None:
    return _Said()
  model = _model(settings)
  return _said_by_open_clip(model) if 'vision_cfg' in model else _said_by_transformers(settings)


def _said_by_transformers(config: Mapping[str, Any]) -> _Said:
  """Reads a config.json; missing values are the defaults of transformers."""
  kind = config.get('model_type')
  if kind not in (None, 'clip', 'clip_text_model'):
    raise UserError(f"its config is of {checks.shown_as_json(kind)}, which isn't CLIP")
  image = clip_names.section(config, 'vision_config')
  text = config if kind == 'clip_text_model' else clip_names.section(config, 'text_config')
  parts = [text] if kind == 'clip_text_model' else [text, image]
  activations = [part.get('hidden_act', 'quick_gelu') for part in parts]
  for part in parts:
    clip_names.check_epsilon(part, _EPSILON)
  activation = activations[0]
  if activations.count(activation) < len(parts) or activation not in tuple(_ACTIVATIONS):
    raise UserError(f'hidden_act={checks.shown(activations)} in its config is not supported')
  end_id = clip_names.whole(text, 'eos_token_id', 49407)
  return _Said(
    image_size=clip_names.whole(image, 'image_size', 224),
    image_heads=clip_names.whole(image, 'num_attention_heads', 12),
    text_heads=clip_names.whole(text, 'num_attention_heads', 8),
    # Older configs have 2, which means the largest id.
    end_id=None if end_id == 2 else end_id,
    activation=_ACTIVATIONS[activation],
  )


def _said_by_open_clip(config: Mapping[str, Any]) -> _Said:
  """Reads a config of open_clip; missing values are its defaults."""
  image, text = (clip_names.section(config, name) for name in ('vision_cfg', 'text_cfg'))
  others = (set(image) - _OPEN_CLIP_IMAGE) | (set(text) - _OPEN_CLIP_TEXT)
  if others:
    raise UserError(f'its config has {", ".join(sorted(others))}, which is not supported')
  width = clip_names.whole(image, 'width', 768)
  return _Said(
    image_size=clip_names.whole(image, 'image_size', 224),
    image_heads=width // clip_names.whole(image, 'head_width', 64),
    text_heads=clip_names.whole(text, 'heads', 8),
    activation='quick_gelu' if config.get('quick_gelu') else 'gelu',
  )
