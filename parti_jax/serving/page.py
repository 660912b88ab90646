"""The page: a prompt, sliders and a gallery, in which pictures appear row by row.

Nothing of it is loaded from elsewhere, and the only files that it serves are Gradio's own and the
pictures of its own folder.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

# Read when Gradio is imported: it must not look for updates, nor send statistics.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'

import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from parti_jax.core.errors import UserError  # noqa: E402
from parti_jax.exported_model import sampling_settings  # noqa: E402
from parti_jax.sampling import editing  # noqa: E402
from parti_jax.sampling import text_to_image  # noqa: E402
from parti_jax.serving import image_requests  # noqa: E402
from parti_jax.serving import image_service  # noqa: E402
from parti_jax.serving import progress as progress_lib  # noqa: E402

# Pictures that a visitor's history keeps.
_MOST_REMEMBERED = 64
# Visitors whose requests are followed at the same time; the others wait.
_VISITORS = 16
# Seconds between two looks at old files, and the age of those that are removed.
_FORGET = (600, 3600)
_LARGEST_UPLOAD = '8mb'
_DEFAULT_IMAGES = 4
_MOST_GUIDANCE = 10.0
_FONTS = ['system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'sans-serif']
_MONOSPACED = ['ui-monospace', 'Menlo', 'Consolas', 'monospace']

# Color of the brush, and the longest side of the editor's canvas.
_PAINT = '#e0218a'
_CANVAS = 512
# Mean difference of levels up to which the editor is taken to show a picture unchanged.
_SAME = 2.0
# What is drawn anew of a picture that is edited -> the field that says so.
_WAYS = {'what I paint': 'mask', 'all but a side': 'keep', 'random parts': 'vary'}

_CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .main { max-width: none !important; }
#title h1 { margin: 0; font-size: 1.5rem; }
#title p { margin: 2px 0 0; opacity: .7; }
.growing { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.growing figure { margin: 0; aspect-ratio: 1; border-radius: 8px; overflow: hidden;
  background: #e0e0e0; }
.growing img { width: 100%; height: 100%; display: block; }
.growing .waiting { animation: waiting 1.6s ease-in-out infinite; }
@keyframes waiting { 50% { opacity: .45; } }
#growing #empty { border: 1px dashed #8888; border-radius: 12px; padding: 90px 20px; text-align: center;
  opacity: .65; }
#status { min-height: 1.6em; }
#pictures .grid-container { gap: 8px; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important; }
#history .grid-container { gap: 6px; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)) !important; }
#pictures .grid-wrap, #history .grid-wrap { min-height: 0 !important; max-height: none;
  height: auto; padding: 0; }
#pictures .gallery-container, #history .gallery-container { min-height: 0 !important;
  height: auto !important; }
#history .grid-container { grid-template-rows: none; grid-auto-rows: auto; height: auto; }
#history .gallery-item { height: auto; }
#history .thumbnail-item { aspect-ratio: 1; height: auto; }
#history .grid-wrap { max-height: 300px; }
#pictures, #history { background: none; border: none !important; box-shadow: none; padding: 0; }
#pictures .grid-wrap, #growing, #growing * { overflow: visible; padding: 0; }
#growing .html-container { padding: 0 !important; }
input[type="range"]::-webkit-slider-thumb { border: 1px solid #8888; }
input[type="range"]::-moz-range-thumb { border: 1px solid #8888; }
@media (max-width: 700px) {  /* Pictures come before the settings. */
  #halves > .column { display: contents; }
  #halves > .column > * { flex: 1 1 100%; }
  #settings, #edit { order: 1; }
  #past { order: 2; }
}
"""
_SHOW_EDITOR = "() => document.querySelector('#edit').scrollIntoView({block: 'center'})"
_EMPTY = '<div id="empty">Say what the picture should show, and press Draw.</div>'


class _Controls:
  """The inputs of the page, in the order in which `Page.draw` takes them."""

  def __init__(self, service: image_service.ImageService):
    self.prompt = gr.Textbox(
      label='Prompt',
      placeholder='woman firefighter: dark skin tone',
      lines=2,
      max_length=service.limits.prompt,
      autofocus=True,
      elem_id='prompt',
    )
    self.negative = gr.Textbox(
      label='Negative prompt',
      placeholder='what the pictures should not show',
      max_length=service.limits.prompt,
      visible=service.sampler.settings.guided,
      elem_id='negative',
    )
    with gr.Row():
      self.go = gr.Button('Draw', variant='primary', scale=3, min_width=120, elem_id='draw')
      self.stop = gr.Button('Stop', scale=1, min_width=80, elem_id='stop')
    with gr.Column(elem_id='settings'):
      self._add_settings(service)
      with gr.Accordion('Edit a picture', open=False, elem_id='edit') as self.edit:
        self._add_editor()

  def _add_settings(self, service: image_service.ImageService) -> None:
    offer, defaults = service.offer, service.sampler.settings
    most = service.limits.images
    self.num_images = gr.Slider(
      1, max(most, 2), min(_DEFAULT_IMAGES, most), step=1, label='Pictures', elem_id='num_images'
    )
    with gr.Row():
      self.seed = gr.Number(
        0,
        min_width=120,
        label='Seed',
        precision=0,
        minimum=0,
        maximum=sampling_settings.LARGEST_SEED,
        elem_id='seed',
      )
      self.new_seed = gr.Checkbox(
        True, label='New seed', info='for each drawing', min_width=120, elem_id='new_seed'
      )
    self.rank = gr.Checkbox(
      False, label='Best first, in the order of the ranker', visible=offer.ranked, elem_id='rank'
    )
    self.upscale = gr.Checkbox(
      False,
      label=f'Enlarge to {offer.upscaled}×{offer.upscaled}',
      visible=offer.upscaled is not None,
      elem_id='upscale',
    )
    with gr.Accordion('Sampling', open=False):
      self.guidance_scale = gr.Slider(
        0,
        max(_MOST_GUIDANCE, defaults.guidance_scale),
        defaults.guidance_scale,
        step=0.1,
        label='Guidance scale',
        info='how closely to follow the prompt',
        visible=defaults.guided,
      )
      self.temperature = gr.Slider(
        0,
        max(2.0, defaults.temperature),
        defaults.temperature,
        step=0.05,
        label='Temperature',
        info='lower is safer; 0 takes the likeliest token',
      )
      codes = service.model.codebook_size
      self.top_k = gr.Slider(
        0, codes, min(defaults.top_k, codes), step=1, label='Top k', info='0 has no limit'
      )
      self.top_p = gr.Slider(
        0.01, 1, defaults.top_p, step=0.01, label='Top p', info='1 has no limit'
      )

  def _add_editor(self) -> None:
    self.source = gr.State(None, time_to_live=_FORGET[1])
    self.editor = gr.ImageEditor(
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
    self.way = gr.Radio(list(_WAYS.items()), value='mask', label='Draw anew', elem_id='way')
    with gr.Row():
      self.side = gr.Dropdown(
        list(editing.SIDES), value='top', label='Side to keep', visible=False, min_width=120
      )
      self.share = gr.Slider(
        0, 1, 0.5, step=0.05, label='Share', visible=False, min_width=120, elem_id='share'
      )
    self.clear = gr.Button('Edit nothing', size='sm', elem_id='clear')

  @property
  def edited(self) -> list[Any]:
    """The components whose values say what to edit."""
    return [self.source, self.editor, self.way, self.side, self.share]

  @property
  def inputs(self) -> list[Any]:
    """The components whose values describe a request."""
    return [
      self.prompt,
      self.negative,
      self.num_images,
      self.seed,
      self.rank,
      self.upscale,
      self.guidance_scale,
      self.temperature,
      self.top_k,
      self.top_p,
    ]


class Page:
  """The page of a service.

  Attributes:
    blocks: Gradio's description of it.
  """

  def __init__(self, service: image_service.ImageService):
    """Builds the page.

    Args:
      service: draws the pictures.
    """
    self._service = service
    offer = service.offer
    about = f'{offer.size}×{offer.size} pixels'
    if offer.upscaled is not None:
      about += f', or enlarged to {offer.upscaled}×{offer.upscaled}'
    title = f'Parti · {offer.model}'
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=_FORGET) as self.blocks:
      gr.Markdown(f'# {title}\n\nPictures of {about}', elem_id='title')
      with gr.Row(elem_id='halves'):
        with gr.Column(scale=2, min_width=300):
          self._controls = _Controls(service)
        with gr.Column(scale=3, min_width=300):
          self._growing = gr.HTML(_EMPTY, elem_id='growing')
          self._pictures = gr.Gallery(
            label='Pictures',
            show_label=False,
            format='png',
            columns=4,
            object_fit='contain',
            visible=False,
            interactive=False,
            buttons=['download', 'fullscreen'],
            elem_id='pictures',
            type='pil',
          )
          self._take = gr.Button('Edit this picture', size='sm', visible=False, elem_id='take')
          self._status = gr.Markdown('', elem_id='status')
          with gr.Accordion('History', open=True, visible=False, elem_id='past') as self._past:
            gr.Markdown('Click a picture to see it again, with its settings.')
            self._past_pictures = gr.Gallery(
              show_label=False,
              format='png',
              columns=8,
              object_fit='contain',
              allow_preview=False,
              interactive=False,
              buttons=[],
              elem_id='history',
            )
      self._history = gr.State([], time_to_live=_FORGET[1])
      self._selected = gr.State(0)
      self._connect()

  def _connect(self) -> None:
    """Says what happens when."""
    controls = self._controls
    shown = [self._growing, self._pictures, self._take, self._selected, self._status]
    seeded = gr.on(
      [controls.go.click, controls.prompt.submit],
      lambda new, seed: secrets.randbits(32) if new else seed,
      [controls.new_seed, controls.seed],
      controls.seed,
      show_progress='hidden',
      api_visibility='private',
    )
    drawing = seeded.then(
      self.draw,
      [self._history, *controls.edited, *controls.inputs],
      [self._history, *shown],
      show_progress='hidden',
      concurrency_limit=_VISITORS,
      api_visibility='private',
    )
    drawing.then(
      self._remembered,
      self._history,
      [self._past, self._past_pictures],
      show_progress='hidden',
      api_visibility='private',
    )
    controls.stop.click(
      lambda: 'Stopped.',
      None,
      self._status,
      cancels=[seeded, drawing],
      show_progress='hidden',
      api_visibility='private',
    )
    self._past_pictures.select(
      self._restored,
      self._history,
      [*controls.inputs, controls.new_seed, *shown],
      show_progress='hidden',
      api_visibility='private',
    )

    self._connect_editor(shown)

  def _connect_editor(self, shown: list[Any]) -> None:
    """Says what happens when in the editor."""
    controls = self._controls
    quiet = {'show_progress': 'hidden', 'api_visibility': 'private'}
    self._pictures.select(_index, None, self._selected, **quiet)
    self._take.click(
      _taken,
      [self._pictures, self._selected],
      [controls.source, controls.editor, controls.edit],
      **quiet,
    ).then(None, js=_SHOW_EDITOR, **quiet)
    controls.clear.click(lambda: (None, None), None, [controls.source, controls.editor], **quiet)
    controls.way.change(
      lambda way: (gr.update(visible=way == 'keep'), gr.update(visible=way != 'mask')),
      controls.way,
      [controls.side, controls.share],
      **quiet,
    )

  def draw(
    self,
    history: list[dict[str, Any]],
    source: Image.Image | None,
    editor: dict[str, Any] | None,
    way: str,
    side: str,
    share: float,
    *values: Any,
  ) -> Iterator[tuple[Any, ...]]:
    """Draws what the controls say.

    Args:
      history: what was drawn before, newest first.
      source: the picture that was last taken from the gallery into the editor, where it is enlarged.
      editor: what the editor has: a background and layers of paint.
      way: what is drawn anew, a value of `_WAYS`.
      side: the side that is kept, for the way 'keep'.
      share: the share that is kept, or drawn anew.
      *values: values of `_Controls.inputs`.

    Yields:
      The history, and updates of the growing pictures, the gallery, its button, the picture selected
      there, and the status.
    """
    try:
      images, more = _edited(source, editor, way, side, share)
      request = self._request(images, more, *values)
      for state in progress_lib.follow(self._service, request):
        if state.result is not None:
          yield self._drawn(history, request, values, state.result)
          return
        status = (
          f'Drawing… {state.share:.0%}'
          if any(image is not None for image in state.images)
          else 'Waiting for a free place…'
        )
        yield (
          gr.skip(),
          gr.update(value=_growing(state.images), visible=True),
          gr.update(visible=False),
          gr.update(visible=False),
          gr.skip(),
          status,
        )
    except UserError as error:
      raise gr.Error(str(error), title='Not drawn', print_exception=False) from error

  def _request(
    self,
    images: dict[str, Image.Image] | None,
    more: dict[str, Any],
    prompt: str,
    negative: str,
    num_images: float,
    seed: float | None,
    rank: bool,
    upscale: bool,
    guidance_scale: float,
    temperature: float,
    top_k: float,
    top_p: float,
  ) -> image_requests.ImageRequest:
    """Returns the request of values of `_Controls.inputs`, checked like any other.

    Args:
      images: the pictures of an edit, if there is one.
      more: its fields.
      prompt: the prompt.
      negative: the negative prompt.
      num_images: number of pictures.
      seed: the seed.
      rank: whether to rank them.
      upscale: whether to enlarge them.
      guidance_scale: a field of SamplingSettings, as are the rest.
      temperature: see there.
      top_k: see there.
      top_p: see there.
    """
    sampling = {'temperature': temperature, 'top_k': int(top_k), 'top_p': top_p}
    if self._service.sampler.settings.guided:
      sampling['guidance_scale'] = guidance_scale
    size = self._service.offer.upscaled if upscale else self._service.offer.size
    return image_requests.checked(
      {
        'prompt': prompt,
        'negative_prompt': negative,
        'n': int(num_images),
        'seed': 0 if seed is None else int(seed),
        'rank': rank,
        'size': f'{size}x{size}',
        'stream': True,
        **sampling,
        **more,
      },
      self._service.offer,
      self._service.limits,
      images,
    )

  def _drawn(
    self,
    history: list[dict[str, Any]],
    request: image_requests.ImageRequest,
    values: Sequence[Any],
    result: text_to_image.Result,
  ) -> tuple[Any, ...]:
    """Returns what the page shows once pictures are drawn."""
    pictures = [_with_metadata(result.png(0, column)) for column in range(result.images.shape[1])]
    status = f'“{_plain(request.prompt)}”, seed {request.seed}'
    for warning in self._service.warnings(request):
      status += f'\n\n⚠️ {_plain(warning)}'
    entry = {'values': values, 'pictures': pictures, 'status': status}
    kept: list[dict[str, Any]] = []
    count = 0
    for old in [entry, *history]:
      count += len(old['pictures'])
      if kept and count > _MOST_REMEMBERED:
        break
      kept.append(old)
    return kept, *_shown(entry)

  @staticmethod
  def _remembered(history: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Returns updates of the history's frame and pictures."""
    pictures = [picture for entry in history for picture in entry['pictures']]
    return gr.update(visible=bool(history)), gr.update(value=pictures, selected_index=None)

  @staticmethod
  def _restored(history: list[dict[str, Any]], chosen: gr.SelectData) -> tuple[Any, ...]:
    """Returns the values with which a picture of the history was drawn, and shows it again."""
    left = chosen.index
    for entry in history:
      if left < len(entry['pictures']):
        return *entry['values'], False, *_shown(entry)
      left -= len(entry['pictures'])
    raise gr.Error('This picture is no longer there.', print_exception=False)


def _index(chosen: gr.SelectData) -> int:
  return chosen.index


def _taken(pictures: Sequence[tuple[Image.Image, Any]] | None, selected: int) -> tuple[Any, ...]:
  """Returns the chosen picture, updates that put it into the editor, and one that shows the editor."""
  if not pictures:
    return gr.skip(), gr.skip(), gr.skip()
  source = pictures[min(selected, len(pictures) - 1)][0].convert('RGB')
  content = {'background': _enlarged(source), 'layers': [], 'composite': None}
  return source, content, gr.update(open=True)


def _enlarged(source: Image.Image) -> Image.Image:
  """Returns a picture in a size in which it can be painted on."""
  times = max(1, _CANVAS // max(source.size))
  return source.resize([times * side for side in source.size], Image.Resampling.BICUBIC)


def _is_of(background: Image.Image, source: Image.Image | None) -> bool:
  """Returns whether the editor shows this picture, and not one that was uploaded since."""
  if source is None:
    return False
  large = _enlarged(source)
  if large.size != background.size:
    return False
  here, there = (np.asarray(image.convert('RGB'), np.float32) for image in (background, large))
  return float(np.abs(here - there).mean()) < _SAME


def _edited(
  source: Image.Image | None, editor: dict[str, Any] | None, way: str, side: str, share: float
) -> tuple[dict[str, Image.Image] | None, dict[str, Any]]:
  """Returns the pictures and the fields of an edit; None and no fields if nothing is edited."""
  if not editor or editor.get('background') is None:
    return None, {}
  background = editor['background']
  image = source if source is not None and _is_of(background, source) else background
  if way != 'mask':
    value = f'{side}:{share}' if way == 'keep' else share
    return {'image': image.convert('RGB')}, {way: value}
  painted = np.zeros(image.size[::-1], bool)
  for layer in editor['layers']:
    paint = layer.getchannel('A').resize(image.size, Image.Resampling.BOX)
    painted |= np.asarray(paint) > 0
  if not painted.any():
    raise image_requests.RequestError(
      'paint over what is to be drawn anew, choose another part, or edit nothing'
    )
  mask = Image.fromarray(painted.astype(np.uint8) * 255)
  return {'image': image.convert('RGB'), 'mask': mask}, {}


def _shown(entry: dict[str, Any]) -> tuple[Any, ...]:
  """Returns updates that show an entry of the history."""
  return (
    gr.update(visible=False),
    gr.update(value=entry['pictures'], visible=True, selected_index=None),
    gr.update(visible=True),
    0,
    entry['status'],
  )


def _theme() -> gr.themes.Base:
  """Returns a theme that loads no fonts, with boxes that can be seen."""
  return gr.themes.Soft(font=_FONTS, font_mono=_MONOSPACED).set(
    checkbox_border_color='*neutral_400',
    checkbox_border_color_dark='*neutral_500',
    input_border_color='*neutral_200',
    input_border_width='1px',
    body_background_fill='*neutral_100',
  )


def _plain(text: str) -> str:
  """Returns a text without meaning in Markdown and HTML."""
  escaped = html.escape(' '.join(text.split()))
  return ''.join(
    f'&#{ord(letter)};' if letter in '\\`*_{}[]()#+-.!|~$:' else letter for letter in escaped
  )


def _growing(images: Sequence[np.ndarray | None]) -> str:
  """Returns HTML of pictures that are being drawn."""
  return f'<div class="growing">{"".join(map(_figure, images))}</div>'


def _figure(image: np.ndarray | None) -> str:
  if image is None:
    return '<figure class="waiting"></figure>'
  content = io.BytesIO()
  Image.fromarray(image).save(content, 'PNG')
  encoded = base64.b64encode(content.getvalue()).decode()
  return f'<figure><img alt="" src="data:image/png;base64,{encoded}"></figure>'


def _with_metadata(png: bytes) -> Image.Image:
  """Returns a picture whose file will have the metadata of this one."""
  picture = Image.open(io.BytesIO(png))
  picture.load()
  return picture


@contextlib.contextmanager
def shown(service: image_service.ImageService, host: str, port: int) -> Iterator[str]:
  """Shows the page to browsers while the context lasts.

  Args:
    service: draws the pictures.
    host: address to listen on.
    port: a free port.

  Yields:
    The URL.

  Raises:
    UserError: if it can't listen there.
  """
  with tempfile.TemporaryDirectory(prefix='parti_jax_page_') as folder:
    before = os.environ.get('GRADIO_TEMP_DIR')
    os.environ['GRADIO_TEMP_DIR'] = folder
    blocks = Page(service).blocks.queue(max_size=service.limits.queue)
    try:
      _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=_LARGEST_UPLOAD,
        footer_links=[],
        theme=_theme(),
        css=_CSS,
      )
      yield url
    except OSError as error:
      raise UserError(f'--host={host} --port={port}: cannot listen there ({error})') from error
    finally:
      blocks.close(verbose=False)
      if before is None:
        del os.environ['GRADIO_TEMP_DIR']
      else:
        os.environ['GRADIO_TEMP_DIR'] = before


def wait_for_signal() -> None:
  """Waits for SIGTERM or Ctrl-C."""
  stop = threading.Event()
  for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *_: stop.set())
  stop.wait()
