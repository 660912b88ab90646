"""The controls of the page: prompts, buttons, and the settings that the model has."""

from __future__ import annotations

from typing import Any

import gradio as gr

from parti_jax.exported_model import sampling_settings
from parti_jax.serving import image_service
from parti_jax.serving.ui import editor

_DEFAULT_IMAGES = 4
_MOST_GUIDANCE = 10.0


class Controls:
  """The controls of the page.

  Attributes:
    prompt: the prompt.
    go: the button that starts drawing.
    stop: the one that stops it.
    seed: the seed.
    new_seed: whether each drawing has a new one.
    edit: the frame around the editor.
    editor: the controls of an edit.
  """

  def __init__(self, service: image_service.ImageService, seconds: float):
    """Adds the controls.

    Args:
      service: draws the pictures.
      seconds: time for which a picture in the editor is remembered.
    """
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
        self.editor = editor.Editor(seconds)

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
      label='' if offer.upscaled is None else f'Enlarge to {offer.shown(upscaled=True)}',
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

  @property
  def inputs(self) -> list[Any]:
    """The components whose values `Page.draw` takes after those of an edit, in its order."""
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
