"""seqio feature converters, which map a task's features to a model's inputs."""

from collections.abc import Mapping

from parti_jax.core.errors import UserError
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.quiet_tensorflow import tf

_Spec = seqio.FeatureConverter.FeatureSpec
_IMAGES = _Spec(dtype=tf.uint8, rank=3)
_TOKENS = _Spec(dtype=tf.int32)


class _Converter(seqio.FeatureConverter):
  """Renames and adds features, but neither packs nor pads.

  t5x constructs converters by `cls(pack=..., use_custom_packing_ops=...)`.
  """

  # Maps the model's feature to the task's feature that gives its values and its length.
  SOURCES: Mapping[str, str]
  PACKING_FEATURE_DTYPES = None

  def __init__(self, pack: bool = False, use_custom_packing_ops: bool = False):
    """Makes a converter.

    Args:
      pack: must be False; all seqio converters have this argument.
      use_custom_packing_ops: ignored; all seqio converters have this argument.

    Raises:
      UserError: `pack` is True.
    """
    del use_custom_packing_ops
    if pack:
      raise UserError(
        f'{type(self).__name__} does not pack: all pictures have the same number of tokens, so '
        'there is no padding to fill; set DatasetConfig.pack = False (in t5x '
        '--gin.train/utils.DatasetConfig.pack=False)'
      )
    super().__init__(pack=False)

  def _convert_features(self, ds, task_feature_lengths):
    del task_feature_lengths  # The preprocessors have set the lengths.
    return ds.map(self._convert_example, num_parallel_calls=tf.data.AUTOTUNE)

  def _convert_example(self, example):
    return {name: example[source] for name, source in self.SOURCES.items()}

  def get_model_feature_lengths(self, task_feature_lengths):
    """Returns the length of each of the model's features."""
    return {name: task_feature_lengths[source] for name, source in self.SOURCES.items()}


class PictureFeatureConverter(_Converter):
  """Only pictures, for the image tokenizer: 'images' uint8 [height, width, 3]."""

  TASK_FEATURES = {'images': _IMAGES}
  MODEL_FEATURES = {'images': _IMAGES}
  SOURCES = {'images': 'images'}


class TextFeatureConverter(_Converter):
  """Only texts: 'encoder_input_tokens' int32 [text_length], padded with 0.

  Texts of third-party tasks in seqio's registry arrive unpadded.
  """

  TASK_FEATURES = {'inputs': _TOKENS}
  MODEL_FEATURES = {'encoder_input_tokens': _TOKENS}
  SOURCES = {'encoder_input_tokens': 'inputs'}

  def _convert_features(self, ds, task_feature_lengths):
    lengths = {name: task_feature_lengths[name] for name in self.TASK_FEATURES}
    padded = self._pack_or_pad(ds, lengths)
    return super()._convert_features(padded, task_feature_lengths)


class PairFeatureConverter(_Converter):
  """Captions and pictures: 'encoder_input_tokens' int32 [text_length], 'images' uint8 [s, s, 3]."""

  TASK_FEATURES = {'inputs': _TOKENS, 'images': _IMAGES}
  MODEL_FEATURES = {'encoder_input_tokens': _TOKENS, 'images': _IMAGES}
  SOURCES = {'encoder_input_tokens': 'inputs', 'images': 'images'}


class PartiFeatureConverter(_Converter):
  """Captions and image tokens, for Parti (section 2.2).

  Returns 'encoder_input_tokens' int32 [text_length], padded with 0; 'decoder_target_tokens' int32
  [image_length], where 0 is an ordinary code, since all pictures have the same number of tokens;
  'decoder_loss_weights' float32 [image_length], all 1.
  """

  TASK_FEATURES = {'inputs': _TOKENS, 'targets': _TOKENS}
  MODEL_FEATURES = {
    'encoder_input_tokens': _TOKENS,
    'decoder_target_tokens': _TOKENS,
    'decoder_loss_weights': _Spec(dtype=tf.float32),
  }
  SOURCES = {
    'encoder_input_tokens': 'inputs',
    'decoder_target_tokens': 'targets',
    'decoder_loss_weights': 'targets',
  }

  def _convert_example(self, example):
    converted = super()._convert_example(example)
    weights = tf.ones_like(converted['decoder_target_tokens'], tf.float32)
    return {**converted, 'decoder_loss_weights': weights}


def converter_for(features) -> seqio.FeatureConverter:
  """Returns the converter for tasks with these features."""
  for converter in (
    TextFeatureConverter,
    PictureFeatureConverter,
    PairFeatureConverter,
    PartiFeatureConverter,
  ):
    if set(converter.TASK_FEATURES) == set(features):
      return converter()
  raise ValueError(f'no feature converter takes the features {sorted(features)}')
