"""The page: what it shows is what was asked for, and nothing else is readable through it."""

import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from parti_jax.cli import main
from parti_jax.sampling import continuous

gr = pytest.importorskip('gradio', reason='gradio is not installed')

from parti_jax.serving import addresses  # noqa: E402
from parti_jax.serving.ui import editor as editor_lib  # noqa: E402
from parti_jax.serving.ui import page as page_lib  # noqa: E402

_SPEC = importlib.util.spec_from_file_location(
  'browser', pathlib.Path(__file__).parent / 'browser.py'
)
browser = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(browser)

# Values of the controls: prompt, negative prompt, pictures, seed, ranked, enlarged, guidance,
# temperature, top k, top p.
VALUES = ('red apple', '', 2, 7, False, False, 3.0, 0.8, 9, 0.9)
# Those of the editor without a picture: source, content, way, side, share.
NOTHING = (None, {'background': None, 'layers': [], 'composite': None}, 'mask', 'top', 0.5)


def free_port():
  with addresses.listen('127.0.0.1', 0) as listening:
    return listening.getsockname()[1]


@pytest.fixture
def url(service_of):
  with page_lib.shown(service_of(), '127.0.0.1', free_port()) as found:
    yield found


def test_drawing_shows_rows_then_pictures_and_remembers_them(service_of, served_model):
  page = page_lib.Page(service_of())
  *growing, (history, hidden, gallery, button, _, status) = page.draw([], *NOTHING, *VALUES)
  assert growing and all('<figure' in update['value'] for _, update, *_ in growing)
  assert button['visible'] is True
  assert hidden['visible'] is False and gallery['visible'] is True
  assert status == '“red apple”, seed 7'
  wanted = served_model.generate(
    'red apple', 2, seed=7, guidance_scale=3.0, temperature=0.8, top_k=9, top_p=0.9
  )
  for column, picture in enumerate(gallery['value']):
    assert np.abs(np.asarray(picture).astype(int) - wanted.images[0, column]).max() <= 1
    assert picture.text == wanted.metadata(0, column) | {'software': picture.text['software']}
  *_, (history, _, gallery, *_) = page.draw(
    history, *NOTHING, 'blue ball', '', 3, 1, True, True, *VALUES[6:]
  )
  assert [len(entry['pictures']) for entry in history] == [3, 2]
  assert np.asarray(gallery['value'][0]).shape == (32, 32, 3)
  # The fourth picture of the history is the first one of the first drawing.
  event = gr.SelectData(None, {'index': 3, 'value': None})
  *values, new_seed, _, gallery, _, _, status = page._restored(history, event)
  assert tuple(values) == VALUES and new_seed is False
  assert gallery['value'] == history[1]['pictures'] and 'red apple' in status


def test_the_history_is_bounded(service_of, monkeypatch):
  monkeypatch.setattr(page_lib, '_MOST_REMEMBERED', 5)
  page, history = page_lib.Page(service_of()), []
  for seed in range(4):
    *_, (history, *_) = page.draw(history, *NOTHING, 'red apple', '', 2, seed, *VALUES[4:])
  assert [entry['values'][3] for entry in history] == [3, 2]


@pytest.mark.parametrize(
  'values, message',
  [
    ((' ', '', 2, 7), 'prompt is empty'),
    (('a', '', 99, 7), 'n=99 must be a whole number from 1 to 4'),
    (('a', '', 2, -1), 'seed=-1'),
    (('x' * 4001, '', 2, 0), '4,001 characters'),
  ],
)
def test_bad_values_are_said_on_the_page(service_of, values, message):
  page = page_lib.Page(service_of())
  with pytest.raises(gr.Error, match=message):
    list(page.draw([], *NOTHING, *values, *VALUES[4:]))


def test_prompts_are_text_and_nothing_else(service_of):
  page = page_lib.Page(service_of())
  text = '<img src=x onerror=alert(1)> **a** [b](c)'
  *_, (*_, status) = page.draw([], *NOTHING, text, '', 1, *VALUES[3:])
  assert not set('<>*[]()') & set(status)


def test_what_the_model_lacks_is_not_on_the_page(service_of, served_model, monkeypatch):
  rich = page_lib.Page(service_of())._controls
  assert rich.rank.visible and rich.upscale.visible and rich.guidance_scale.visible
  monkeypatch.setattr(served_model, 'ranker', None)
  monkeypatch.setattr(served_model, 'upscaler', None)
  poor = page_lib.Page(service_of())._controls
  assert not poor.rank.visible and not poor.upscale.visible


def test_a_negative_prompt_is_drawn_with(service_of, served_model):
  page = page_lib.Page(service_of())
  *_, (_, _, gallery, *_) = page.draw([], *NOTHING, 'red apple', 'blue ball', *VALUES[2:])
  wanted = served_model.generate(
    'red apple', 2, 7, negative='blue ball', guidance_scale=3.0, temperature=0.8, top_k=9, top_p=0.9
  )
  for column, picture in enumerate(gallery['value']):
    assert np.abs(np.asarray(picture).astype(int) - wanted.images[0, column]).max() <= 1
    assert picture.text['negative'] == 'blue ball'


@pytest.mark.parametrize(
  'way, edit', [('mask', 'mask'), ('keep', 'keep=left:0.25'), ('vary', 'vary=0.25')]
)
def test_a_picture_of_the_gallery_is_edited(service_of, served_model, way, edit):
  page = page_lib.Page(service_of())
  *_, (history, _, gallery, *_) = page.draw([], *NOTHING, *VALUES)
  pictures = [(picture, None) for picture in gallery['value']]
  source, editor, accordion = editor_lib.load(pictures, 1)
  np.testing.assert_array_equal(source, pictures[1][0])
  assert accordion['open'] is True
  assert editor['background'].size == (512, 512)
  # As the editor gives it back, with paint over the second and third patch of the second row.
  paint = np.zeros([512, 512, 4], np.uint8)
  paint[140:250, 140:380] = 255
  editor |= {'layers': [Image.fromarray(paint, 'RGBA')]}
  *_, (_, _, gallery, *_) = page.draw(
    history, source, editor, way, 'left', 0.25, 'blue ball', '', 2, 9, *VALUES[4:]
  )
  mask = np.zeros([16, 16], bool)
  mask[4:8, 4:12] = True
  how = {'mask': {'mask': mask}, 'keep': {'keep': 'left:0.25'}, 'vary': {'vary': 0.25}}[way]
  wanted = served_model.generate(
    'blue ball', 2, 9, image=source, guidance_scale=3.0, temperature=0.8, top_k=9, top_p=0.9, **how
  )
  for column, picture in enumerate(gallery['value']):
    assert np.abs(np.asarray(picture).astype(int) - wanted.images[0, column]).max() <= 1
    assert picture.text == wanted.metadata(0, column) | {'software': picture.text['software']}
    assert picture.text['edit'] == edit


def test_a_picture_that_is_uploaded_takes_the_place_of_one_of_the_gallery(service_of):
  source = Image.new('RGB', (16, 16), 'red')
  shown = Image.new('RGBA', (512, 512), 'red')
  uploaded = Image.new('RGBA', (512, 512), 'blue')
  editor = lambda background: {'background': background, 'layers': []}
  images, more = editor_lib.edited(source, editor(shown), 'keep', 'left', 0.5)
  assert images['image'].size == (16, 16) and more == {'keep': 'left:0.5'}
  images, _ = editor_lib.edited(source, editor(uploaded), 'vary', 'left', 0.5)
  assert images['image'].size == (512, 512) and images['image'].getpixel((0, 0)) == (0, 0, 255)


def test_an_edit_needs_paint(service_of):
  page = page_lib.Page(service_of())
  editor = {'background': Image.new('RGBA', (32, 32)), 'layers': [Image.new('RGBA', (32, 32))]}
  with pytest.raises(gr.Error, match='paint over what is to be redrawn'):
    list(page.draw([], None, editor, 'mask', 'top', 0.5, *VALUES))


def _status(url):
  try:
    with urllib.request.urlopen(url, timeout=60) as answer:
      return answer.status, answer.read()
  except urllib.error.HTTPError as error:
    return error.code, error.read()


def test_nothing_outside_of_its_folder_is_readable(url, tmp_path, monkeypatch):
  secret = tmp_path / 'secret.txt'
  secret.write_text('a secret')
  monkeypatch.chdir(tmp_path)
  assert _status(url)[0] == 200
  for path in (
    'gradio_api/file=/etc/passwd',
    'gradio_api/file=../../../../../../etc/passwd',
    'gradio_api/file=%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd',
    'gradio_api/file=secret.txt',
    f'gradio_api/file={secret}',
    f'gradio_api/file={os.environ["GRADIO_TEMP_DIR"]}/../../{secret}',
    f'gradio_api/file={page_lib.__file__}',
    'gradio_api/file=file:///etc/passwd',
    'file=/etc/passwd',
    'file/etc/passwd',
    'static/../../../../etc/passwd',
    'assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd',
    'theme.css/../../etc/passwd',
    'custom_component/a/b/c/../../../../../etc/passwd',
  ):
    status, body = _status(f'{url}{path}')
    assert status >= 400 or b'<!doctype html>' in body[:200].lower(), path
    assert b'root:' not in body and b'a secret' not in body and b'"""The page' not in body, path


def test_nothing_of_the_page_is_loaded_from_elsewhere(url):
  content = json.dumps(json.loads(_status(f'{url}config')[1])['css'])
  assert 'http' not in content and '@import' not in content
  assert b'fonts.googleapis' not in _status(f'{url}theme.css')[1]
  addresses_in = re.findall(rb'url\([\'"]?([^)]*)', _status(f'{url}theme.css')[1])
  assert all(address.startswith(b'data:') for address in addresses_in)


def test_the_folder_of_pictures_goes_with_the_page(service_of):
  with page_lib.shown(service_of(), '127.0.0.1', free_port()):
    folder = pathlib.Path(os.environ['GRADIO_TEMP_DIR'])
    assert folder.is_dir()
  assert not folder.exists() and 'GRADIO_TEMP_DIR' not in os.environ


def test_bad_flags_of_the_command(capsys):
  assert main.main(['ui', '--max_images=0']) == 2
  error = capsys.readouterr().err
  assert '--max_images=0' in error and len(error.splitlines()) == 1
  with addresses.listen('127.0.0.1', 0) as taken:
    taken.listen()
    assert main.main(['ui', f'--port={taken.getsockname()[1]}']) == 2
  assert 'cannot listen there' in capsys.readouterr().err


@pytest.mark.process
def test_the_command_shows_the_page_until_sigterm(served_folder, tmp_path):
  command = [sys.executable, '-P', '-m', 'parti_jax.cli.main', 'ui', '--port=0', '--batch_size=2']
  process = subprocess.Popen(
    [*command, f'--model={served_folder}'], stdout=subprocess.PIPE, text=True, cwd=tmp_path
  )
  try:
    line = process.stdout.readline()
    assert line.startswith('tiny draws at http://127.0.0.1:')
    assert b'Parti' in _status(line.split()[-1])[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
  finally:
    process.kill()
    process.communicate()


@pytest.fixture(scope='module')
def chromium():
  if importlib.util.find_spec('playwright') is None:
    pytest.skip('playwright is not installed')
  if browser.CHROMIUM is None:
    pytest.skip('there is no Chromium; CHROMIUM=PATH names one')
  with browser.browser() as found:
    yield found


@pytest.fixture
def slow_steps(monkeypatch):
  """Makes rows appear one after the other for a person to see."""
  step = continuous.ContinuousSampler._step

  def slow(sampler):
    time.sleep(0.4)
    step(sampler)

  monkeypatch.setattr(continuous.ContinuousSampler, '_step', slow)


_NOTE_PICTURES = """() => {
  window.seen = [];
  const note = () => {
    const first = document.querySelector('#growing img');
    if (first && seen[seen.length - 1] !== first.src) seen.push(first.src);
  };
  new MutationObserver(note).observe(
    document.body, {subtree: true, childList: true, attributes: true});
}"""


@pytest.mark.browser
def test_in_a_browser_a_picture_appears_row_by_row(chromium, url, slow_steps, served_model):
  requests, errors = [], []
  with browser.page(chromium, url, requests=requests) as found:
    found.on('pageerror', lambda error: errors.append(error))
    browser.ask(found, 'red apple', 7)
    found.evaluate(_NOTE_PICTURES)
    browser.draw(found)
    assert found.evaluate('seen.length') >= 2
    assert 'red apple' in found.inner_text('#status') and 'seed 7' in found.inner_text('#status')
    sources = found.eval_on_selector_all('#pictures img', 'images => images.map(i => i.src)')
    shown = [urllib.request.urlopen(source, timeout=60).read() for source in sources]
  wanted = served_model.generate('red apple', 4, seed=7)
  assert len(shown) == 4
  for column, content in enumerate(shown):
    with Image.open(io.BytesIO(content)) as picture:
      assert np.abs(np.asarray(picture).astype(int) - wanted.images[0, column]).max() <= 1
      assert picture.text['seed'] == '7' and picture.text['prompt'] == 'red apple'
  assert not errors
  assert not [address for address in requests if not address.startswith((url, 'data:', 'blob:'))]


@pytest.mark.browser
def test_in_a_browser_stop_frees_the_places(chromium, service_of, gate):
  service = service_of()
  with page_lib.shown(service, '127.0.0.1', free_port()) as url:
    with browser.page(chromium, url) as found:
      browser.ask(found, 'red apple')
      gate.clear()
      found.click('#draw')
      found.wait_for_function("document.querySelector('#status').innerText.includes('Waiting')")
      assert service.pending == 4
      found.click('#stop')
      found.wait_for_function("document.querySelector('#status').innerText.includes('Stopped')")
      end = time.monotonic() + 60
      while service.pending and time.monotonic() < end:
        time.sleep(0.05)
      assert service.pending == 0
      gate.set()
      browser.draw(found)


@pytest.mark.browser
def test_in_a_browser_the_history_brings_settings_back(chromium, url):
  with browser.page(chromium, url) as found:
    browser.ask(found, 'red apple', 7)
    browser.draw(found)
    browser.ask(found, 'blue ball', 8)
    found.click('#draw')
    found.wait_for_function("document.querySelectorAll('#history img').length === 8")
    found.click('#history button >> nth=5')
    found.wait_for_function("document.querySelector('#status').innerText.includes('red apple')")
    assert found.input_value('#prompt textarea') == 'red apple'
    assert found.input_value('#seed input') == '7'
    # What is wrong is said, and what was there stays.
    found.fill('#prompt textarea', ' ')
    found.click('#draw')
    found.wait_for_selector('text=prompt is empty')


@pytest.mark.browser
def test_in_a_browser_a_brush_says_what_to_redraw(chromium, url, served_model):
  with browser.page(chromium, url) as found:
    browser.ask(found, 'red apple', 7)
    browser.draw(found)
    browser.paint(found)
    browser.ask(found, 'blue ball', 8)
    found.click('#draw')
    found.wait_for_function("document.querySelector('#status').innerText.includes('blue ball')")
    source = found.get_attribute('#pictures img', 'src')
    with Image.open(io.BytesIO(urllib.request.urlopen(source, timeout=60).read())) as picture:
      picture.load()
  assert picture.text['edit'] == 'mask'
  kept = np.unpackbits(np.frombuffer(bytes.fromhex(picture.text['kept_tokens']), np.uint8)) > 0
  before = served_model.generate('red apple', 1, seed=7)
  mask = np.repeat(np.repeat(~kept[:16].reshape(4, 4), 4, axis=0), 4, axis=1)
  assert 1 <= (~kept[:16]).sum() < 16
  wanted = served_model.generate('blue ball', 1, seed=8, image=before.images[0, 0], mask=mask)
  assert np.abs(np.asarray(picture).astype(int) - wanted.images[0, 0]).max() <= 1


@pytest.mark.browser
@pytest.mark.parametrize('viewport', [browser.DESKTOP, browser.PHONE], ids=['desktop', 'phone'])
def test_in_a_browser_everything_is_within_the_window(chromium, url, viewport):
  with browser.page(chromium, url, viewport) as found:
    browser.ask(found, 'red apple', 7)
    browser.draw(found)
    assert found.evaluate('document.documentElement.scrollWidth') <= viewport['width']
    pictures = [box.bounding_box() for box in found.query_selector_all('#pictures img')]
    settings = found.query_selector('#settings').bounding_box()
    assert all(box['x'] >= 0 and box['x'] + box['width'] <= viewport['width'] for box in pictures)
    assert all(abs(box['width'] - box['height']) <= 2 and box['width'] > 100 for box in pictures)
    beside = pictures[0]['x'] >= settings['x'] + settings['width']
    above = pictures[-1]['y'] + pictures[-1]['height'] <= settings['y']
    assert beside if viewport is browser.DESKTOP else above
