"""Drives the page in headless Chromium, for the tests and for the screenshots in the documentation.

  python tests/serving/browser.py FOLDER

starts `parti-jax ui` with the demo model and writes FOLDER/page_desktop.png and
FOLDER/page_phone.png: the page before and during drawing, and after an edit, at two widths.
"""

import contextlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from PIL import Image

CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('google-chrome')
_FLAGS = [
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
]
DESKTOP = {'width': 1040, 'height': 640}
PHONE = {'width': 390, 'height': 760}
# Milliseconds that anything may take.
_PATIENCE = 120_000
_GAP = 16


@contextlib.contextmanager
def browser():
  """Yields Chromium, of a user without a past."""
  from playwright import sync_api

  with sync_api.sync_playwright() as playwright, tempfile.TemporaryDirectory() as home:
    found = playwright.chromium.launch(
      executable_path=CHROMIUM, args=_FLAGS, env=os.environ | {'HOME': home}
    )
    yield found
    found.close()


@contextlib.contextmanager
def page(chromium, url, viewport=DESKTOP, requests=None):
  """Yields the page.

  Args:
    chromium: a result of `browser`.
    url: its address.
    viewport: width and height of the window.
    requests: a list, to which the address of each request is added.
  """
  context = chromium.new_context(viewport=viewport, accept_downloads=True)
  context.set_default_timeout(_PATIENCE)
  found = context.new_page()
  if requests is not None:
    found.on('request', lambda request: requests.append(request.url))
  found.goto(url)
  found.wait_for_selector('#prompt textarea')
  yield found
  context.close()


def ask(found, prompt, seed=None):
  """Fills the form in."""
  found.fill('#prompt textarea', prompt)
  if seed is not None:
    found.uncheck('#new_seed input')
    found.fill('#seed input', str(seed))


def draw(found):
  """Draws, and waits for the pictures."""
  found.click('#draw')
  found.wait_for_selector('#pictures img')
  found.wait_for_selector('#history img')


def paint(found):
  """Takes the first picture into the editor, and paints over some of it."""
  found.click('#take')
  found.wait_for_selector('#editor canvas')
  found.wait_for_timeout(1500)  # The editor draws its canvas.
  canvas = found.locator('#editor canvas').first
  canvas.scroll_into_view_if_needed()
  box = canvas.bounding_box()
  across = lambda share: box['x'] + share * box['width']
  down = lambda share: box['y'] + share * box['height']
  found.mouse.move(across(0.45), down(0.45))
  found.mouse.down()
  found.mouse.move(across(0.55), down(0.55), steps=8)
  found.mouse.up()
  found.wait_for_timeout(1500)


def _states(chromium, url, viewport):
  """Returns screenshots of the page before and during drawing, and after an edit."""
  taken = []
  with page(chromium, url, viewport) as found:
    take = lambda: taken.append(Image.open(io.BytesIO(found.screenshot(full_page=True))))
    found.wait_for_timeout(1000)
    take()
    ask(found, 'woman firefighter: dark skin tone', 1)
    found.click('#draw')
    found.wait_for_function("document.querySelector('#status').innerText.match(/[4-7][0-9]%/)")
    take()
    found.wait_for_selector('#history img')
    paint(found)
    ask(found, 'man cook: light skin tone', 3)
    found.click('#draw')
    found.wait_for_function("document.querySelector('#status').innerText.includes('man cook')")
    found.wait_for_function("document.querySelectorAll('#history img').length >= 8")
    found.wait_for_timeout(1500)
    take()
  return taken


def _sheet(pictures):
  """Returns pictures on one sheet, high ones side by side and wide ones below each other."""
  widths, heights = zip(*(picture.size for picture in pictures))
  gaps = _GAP * (len(pictures) - 1)
  beside = heights[0] > widths[0]
  across, down = (1, 0) if beside else (0, 1)
  size = (sum(widths) + gaps, max(heights)) if beside else (max(widths), sum(heights) + gaps)
  sheet = Image.new('RGB', size, 'white')
  place = (0, 0)
  for picture in pictures:
    sheet.paste(picture.convert('RGB'), place)
    place = (
      place[0] + across * (picture.width + _GAP),
      place[1] + down * (picture.height + _GAP),
    )
  return sheet.quantize(192, dither=Image.Dither.NONE)


def main():
  folder = pathlib.Path(sys.argv[1])
  command = [sys.executable, '-P', '-m', 'parti_jax.cli.main', 'ui', '--port=0']
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    url = process.stdout.readline().split()[-1]
    with browser() as chromium:
      for name, viewport in (('desktop', DESKTOP), ('phone', PHONE)):
        path = folder / f'page_{name}.png'
        _sheet(_states(chromium, url, viewport)).save(path, optimize=True)
        print(path)
  finally:
    process.terminate()
    process.wait()


if __name__ == '__main__':
  main()
