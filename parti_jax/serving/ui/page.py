"""The page: a prompt, sliders and a gallery, in which pictures appear row by row.

Nothing of it is loaded from elsewhere, and the only files that it serves are Gradio's own and the
pictures of its own folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.sampling import results
from parti_jax.serving import image_requests
from parti_jax.serving import image_service
from parti_jax.serving import progress as progress_lib
from parti_jax.serving.ui import controls as controls_lib
from parti_jax.serving.ui import editor as editor_lib
from parti_jax.serving.ui import style

# Pictures that a visitor's history keeps.
_MOST_REMEMBERED = 64
# Visitors whose requests are followed at the same time; the others wait.
_VISITORS = 16
# Seconds between two looks at old files, and the age of those that are removed.
_FORGET = (600, 3600)
_LARGEST_UPLOAD = '8mb'
_SHOW_EDITOR = "() => document.querySelector('#edit').scrollIntoView({block: 'center'})"


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
    about = f'{offer.shown()} pixels'
    if offer.upscaled is not None:
      about += f', or enlarged to {offer.shown(upscaled=True)}'
    title = f'Parti · {offer.model}'
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=_FORGET) as self.blocks:
      gr.Markdown(f'# {title}\n\nPictures of {about}', elem_id='title')
      with gr.Row(elem_id='halves'):
        with gr.Column(scale=2, min_width=300):
          self._controls = controls_lib.Controls(service, _FORGET[1])
        with gr.Column(scale=3, min_width=300):
          self._growing = gr.HTML(style.EMPTY, elem_id='growing')
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
      [self._history, *controls.editor.inputs, *controls.inputs],
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
    self._connect_editor()

  def _connect_editor(self) -> None:
    """Says what happens when a picture is edited."""
    controls = self._controls
    quiet = {'show_progress': 'hidden', 'api_visibility': 'private'}
    self._pictures.select(_index, None, self._selected, **quiet)
    self._take.click(
      editor_lib.load,
      [self._pictures, self._selected],
      [*controls.editor.loaded, controls.edit],
      **quiet,
    ).then(None, js=_SHOW_EDITOR, **quiet)
    controls.editor.connect(**quiet)

  def draw(
    self,
    history: list[dict[str, Any]],
    source: Image.Image | None,
    canvas: dict[str, Any] | None,
    way: str,
    side: str,
    share: float,
    *values: Any,
  ) -> Iterator[tuple[Any, ...]]:
    """Draws what the controls say.

    Args:
      history: what was drawn before, newest first.
      source: an argument of `editor.edited`, as are the next four.
      canvas: the second of them.
      way: the third.
      side: the fourth.
      share: the fifth.
      *values: values of `Controls.inputs`.

    Yields:
      The history, and updates of the growing pictures, the gallery, its button, the picture selected
      there, and the status.
    """
    try:
      images, more = editor_lib.edited(source, canvas, way, side, share)
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
          gr.update(value=style.growing(state.images), visible=True),
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
    """Returns the request of values of `Controls.inputs`, checked like any other.

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
    return image_requests.checked(
      {
        'prompt': prompt,
        'negative_prompt': negative,
        'n': int(num_images),
        'seed': 0 if seed is None else int(seed),
        'rank': rank,
        'size': self._service.offer.pixels(upscale),
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
    result: results.Result,
  ) -> tuple[Any, ...]:
    """Returns what the page shows once pictures are drawn."""
    pictures = [_with_metadata(result.png(0, column)) for column in range(result.images.shape[1])]
    status = f'“{style.plain(request.prompt)}”, seed {request.seed}'
    for warning in self._service.warnings(request):
      status += f'\n\n⚠️ {style.plain(warning)}'
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


def _shown(entry: dict[str, Any]) -> tuple[Any, ...]:
  """Returns updates that show an entry of the history."""
  return (
    gr.update(visible=False),
    gr.update(value=entry['pictures'], visible=True, selected_index=None),
    gr.update(visible=True),
    0,
    entry['status'],
  )


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
        theme=style.theme(),
        css=style.CSS,
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
