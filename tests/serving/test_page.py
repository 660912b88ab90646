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
from parti_jax.serving import page as page_lib  # noqa: E402

_SPEC = importlib.util.spec_from_file_location(
  'browser', pathlib.Path(__file__).parent / 'browser.py'
)
browser = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(browser)

# Values of the controls: prompt, pictures, seed, ranked, enlarged, guidance, temperature, top k, top p.
VALUES = ('red apple', 2, 7, False, False, 3.0, 0.8, 9, 0.9)


def free_port():
  with addresses.listen('127.0.0.1', 0) as listening:
    return listening.getsockname()[1]


@pytest.fixture
def url(service_of):
  with page_lib.shown(service_of(), '127.0.0.1', free_port()) as found:
    yield found


def test_drawing_shows_rows_then_pictures_and_remembers_them(service_of, served_model):
  page = page_lib.Page(service_of())
  *growing, (history, hidden, gallery, status) = page.draw([], *VALUES)
  assert growing and all('<figure' in update['value'] for _, update, _, _ in growing)
  assert hidden['visible'] is False and gallery['visible'] is True
  assert status == '“red apple”, seed 7'
  wanted = served_model.generate(
    'red apple', 2, seed=7, guidance_scale=3.0, temperature=0.8, top_k=9, top_p=0.9
  )
  for column, picture in enumerate(gallery['value']):
    assert np.abs(np.asarray(picture).astype(int) - wanted.images[0, column]).max() <= 1
    assert picture.text == wanted.metadata(0, column) | {'software': picture.text['software']}
  *_, (history, _, gallery, _) = page.draw(history, 'blue ball', 3, 1, True, True, *VALUES[5:])
  assert [len(entry['pictures']) for entry in history] == [3, 2]
  assert np.asarray(gallery['value'][0]).shape == (32, 32, 3)
  # The fourth picture of the history is the first one of the first drawing.
  event = gr.SelectData(None, {'index': 3, 'value': None})
  *values, new_seed, _, gallery, status = page._restored(history, event)
  assert tuple(values) == VALUES and new_seed is False
  assert gallery['value'] == history[1]['pictures'] and 'red apple' in status


def test_the_history_is_bounded(service_of, monkeypatch):
  monkeypatch.setattr(page_lib, '_MOST_REMEMBERED', 5)
  page, history = page_lib.Page(service_of()), []
  for seed in range(4):
    *_, (history, _, _, _) = page.draw(history, 'red apple', 2, seed, *VALUES[3:])
  assert [entry['values'][2] for entry in history] == [3, 2]


@pytest.mark.parametrize(
  'values, message',
  [
    ((' ', 2, 7), 'prompt is empty'),
    (('a', 99, 7), 'n=99 must be a whole number from 1 to 4'),
    (('a', 2, -1), 'seed=-1'),
    (('x' * 4001, 2, 0), '4,001 characters'),
  ],
)
def test_bad_values_are_said_on_the_page(service_of, values, message):
  page = page_lib.Page(service_of())
  with pytest.raises(gr.Error, match=message):
    list(page.draw([], *values, *VALUES[3:]))


def test_prompts_are_text_and_nothing_else(service_of):
  page = page_lib.Page(service_of())
  *_, (_, _, _, status) = page.draw([], '<img src=x onerror=alert(1)> **a** [b](c)', 1, *VALUES[2:])
  assert not set('<>*[]()') & set(status)


def test_what_the_model_lacks_is_not_on_the_page(service_of, served_model, monkeypatch):
  rich = page_lib.Page(service_of())._controls
  assert rich.rank.visible and rich.upscale.visible and rich.guidance_scale.visible
  monkeypatch.setattr(served_model, 'ranker', None)
  monkeypatch.setattr(served_model, 'upscaler', None)
  poor = page_lib.Page(service_of())._controls
  assert not poor.rank.visible and not poor.upscale.visible


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
def slow_turns(monkeypatch):
  """Makes rows appear one after the other for a person to see."""
  turn = continuous.ContinuousSampler._turn

  def slow(sampler):
    time.sleep(0.4)
    turn(sampler)

  monkeypatch.setattr(continuous.ContinuousSampler, '_turn', slow)


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
def test_in_a_browser_a_picture_appears_row_by_row(chromium, url, slow_turns, served_model):
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
