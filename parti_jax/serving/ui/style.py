"""How the page looks: its theme, its style sheet, and the pictures that are being drawn as HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import gradio as gr
import numpy as np
from PIL import Image

_FONTS = ['system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'sans-serif']
_MONOSPACED = ['ui-monospace', 'Menlo', 'Consolas', 'monospace']

CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .main { max-width: none !important; }
#title h1 { margin: 0; font-size: 1.5rem; }
#title p { margin: 2px 0 0; opacity: .7; }
.growing { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.growing figure { margin: 0; aspect-ratio: 1; border-radius: 8px; overflow: hidden;
  background: #e0e0e0; }
.growing img { width: 100%; height: 100%; object-fit: contain; display: block; }
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
# What is shown where pictures will be.
EMPTY = '<div id="empty">Say what the picture should show, and press Draw.</div>'


def theme() -> gr.themes.Base:
  """Returns a theme that loads no fonts, with boxes that can be seen."""
  return gr.themes.Soft(font=_FONTS, font_mono=_MONOSPACED).set(
    checkbox_border_color='*neutral_400',
    checkbox_border_color_dark='*neutral_500',
    input_border_color='*neutral_200',
    input_border_width='1px',
    body_background_fill='*neutral_100',
  )


def plain(text: str) -> str:
  """Returns a text without meaning in Markdown and HTML."""
  escaped = html.escape(' '.join(text.split()))
  return ''.join(
    f'&#{ord(letter)};' if letter in '\\`*_{}[]()#+-.!|~$:' else letter for letter in escaped
  )


def growing(images: Sequence[np.ndarray | None]) -> str:
  """Returns HTML of pictures that are being drawn."""
  return f'<div class="growing">{"".join(map(_figure, images))}</div>'


def _figure(image: np.ndarray | None) -> str:
  if image is None:
    return '<figure class="waiting"></figure>'
  content = io.BytesIO()
  Image.fromarray(image).save(content, 'PNG')
  encoded = base64.b64encode(content.getvalue()).decode()
  return f'<figure><img alt="" src="data:image/png;base64,{encoded}"></figure>'
