"""The editor of the page: which picture is edited, and which part of it is redrawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from parti_jax.sampling import editing
from parti_jax.serving import image_requests

# Color of the brush, and the longest side of the canvas.
_PAINT = '#e0218a'
_CANVAS = 512
# Mean difference of levels up to which the canvas is taken to show a picture unchanged.
_SAME = 2.0
# What is redrawn of a picture -> the field of a request that says so.
_WAYS = {'what I paint': 'mask', 'all but a side': 'keep', 'random parts': 'vary'}


class Editor:
  """The controls of an edit.

  Attributes:
    inputs: the components whose values `edited` takes, in its order: the picture that was last taken
      from the gallery, the canvas, what is redrawn, and the side and the share to keep.
  """

  def __init__(self, seconds: float):
    """Adds the controls.

    Args:
      seconds: time for which a picture of the gallery is remembered.
    """
    self._source = gr.State(None, time_to_live=seconds)
    self._canvas = gr.ImageEditor(
      show_label=False,
      type='pil',
      format='png',
      image_mode='RGBA',
      sources=('upload', 'clipboard'),
      transforms=(),
      layers=False,
      brush=gr.Brush(default_size=40, colors=[_PAINT], default_color=_PAINT, color_mode='fixed'),
      canvas_size=(_CANVAS, _CANVAS),
      height=430,
      buttons=[],
      elem_id='editor',
    )
    self._way = gr.Radio(list(_WAYS.items()), value='mask', label='Redraw', elem_id='way')
    with gr.Row():
      self._side = gr.Dropdown(
        list(editing.SIDES), value='top', label='Side to keep', visible=False, min_width=120
      )
      self._share = gr.Slider(
        0, 1, 0.5, step=0.05, label='Share', visible=False, min_width=120, elem_id='share'
      )
    self._clear = gr.Button('Edit nothing', size='sm', elem_id='clear')
    self.inputs = [self._source, self._canvas, self._way, self._side, self._share]

  @property
  def loaded(self) -> list[Any]:
    """The components that the first two results of `load` are for."""
    return [self._source, self._canvas]

  def connect(self, **options: Any) -> None:
    """Says what the controls do.

    Args:
      **options: options of all of Gradio's events.
    """
    self._clear.click(lambda: (None, None), None, self.loaded, **options)
    self._way.change(
      lambda way: (gr.update(visible=way == 'keep'), gr.update(visible=way != 'mask')),
      self._way,
      [self._side, self._share],
      **options,
    )


def load(pictures: Sequence[tuple[Image.Image, Any]] | None, selected: int) -> tuple[Any, ...]:
  """Returns the chosen picture of a gallery, the canvas with it, and an update that opens the editor."""
  if not pictures:
    return gr.skip(), gr.skip(), gr.skip()
  source = pictures[min(selected, len(pictures) - 1)][0].convert('RGB')
  content = {'background': _enlarged(source), 'layers': [], 'composite': None}
  return source, content, gr.update(open=True)


def edited(
  source: Image.Image | None, canvas: dict[str, Any] | None, way: str, side: str, share: float
) -> tuple[dict[str, Image.Image] | None, dict[str, Any]]:
  """Returns an edit as `image_requests.checked` takes it.

  Args:
    source: the picture that was last taken from the gallery; the canvas shows it enlarged.
    canvas: a background and layers of paint.
    way: what is redrawn, a value of `_WAYS`.
    side: the side that is kept, for the way 'keep'.
    share: the share that is kept, or redrawn.

  Returns:
    The pictures, or None if nothing is edited, and the fields.

  Raises:
    RequestError: if nothing is painted, for the way 'mask'.
  """
  if not canvas or canvas.get('background') is None:
    return None, {}
  background = canvas['background']
  image = source if source is not None and _is_of(background, source) else background
  if way != 'mask':
    value = f'{side}:{share}' if way == 'keep' else share
    return {'image': image.convert('RGB')}, {way: value}
  painted = np.zeros(image.size[::-1], bool)
  for layer in canvas['layers']:
    paint = layer.getchannel('A').resize(image.size, Image.Resampling.BOX)
    painted |= np.asarray(paint) > 0
  if not painted.any():
    raise image_requests.RequestError(
      'paint over what is to be redrawn, choose another part, or edit nothing'
    )
  mask = Image.fromarray(painted.astype(np.uint8) * 255)
  return {'image': image.convert('RGB'), 'mask': mask}, {}


def _enlarged(source: Image.Image) -> Image.Image:
  """Returns a picture in a size in which it can be painted on."""
  times = max(1, _CANVAS // max(source.size))
  return source.resize([times * side for side in source.size], Image.Resampling.BICUBIC)


def _is_of(background: Image.Image, source: Image.Image | None) -> bool:
  """Returns whether the canvas shows this picture, and not one that was uploaded since."""
  if source is None:
    return False
  large = _enlarged(source)
  if large.size != background.size:
    return False
  here, there = (np.asarray(image.convert('RGB'), np.float32) for image in (background, large))
  return float(np.abs(here - there).mean()) < _SAME
