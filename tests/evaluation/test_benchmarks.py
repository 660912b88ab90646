"""Tests of `parti-jax prompts --format` and `--results`.

The readers here do what the public judges do, so that a layout that they would misread fails.
"""

import argparse
import json
import os
import re

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import prompts as prompts_lib
from parti_jax.core.errors import UserError
from parti_jax.evaluation import measurement
from parti_jax.evaluation.benchmarks import drawing
from parti_jax.evaluation.benchmarks import hps
from parti_jax.evaluation.benchmarks import registry


def draw(caption, index):
  """Returns a picture whose color depends on its prompt and index."""
  return np.full((fakes.SIZE, fakes.SIZE, 3), (5 * index + len(caption)) % 256, np.uint8)


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  pipeline = fakes.FakePipeline(draw, fakes.FakeRanker(draw))
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None, weights='float': pipeline
  )
  return pipeline


def run(*arguments):
  parser = argparse.ArgumentParser()
  prompts_lib.add_arguments(parser)
  return prompts_lib.run(parser.parse_args(list(map(str, arguments))))


def pixels(path):
  with Image.open(path) as picture:
    return np.asarray(picture.convert('RGB'))


GENEVAL = [
  {
    'tag': 'single_object',
    'include': [{'class': 'bench', 'count': 1}],
    'prompt': 'a photo of a bench',
  },
  {
    'tag': 'counting',
    'include': [{'class': 'cow', 'count': 2}],
    'exclude': [{'class': 'cow', 'count': 3}],
    'prompt': 'a photo of two cows',
  },
  {
    'tag': 'counting',
    'include': [{'class': 'kühe', 'count': 1}],
    'prompt': 'a photo of a kühe',
  },
]


@pytest.fixture(name='geneval')
def fixture_geneval(tmp_path):
  path = tmp_path / 'evaluation_metadata.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in GENEVAL))
  return path


@pytest.fixture(name='dpg')
def fixture_dpg(tmp_path):
  folder = tmp_path / 'dpg'
  folder.mkdir()
  for name, text in (('0', 'a long prompt\n'), ('10', 'two\nlines'), ('partiprompts2', 'another')):
    (folder / f'{name}.txt').write_text(text)
  return folder


@pytest.fixture(name='t2i')
def fixture_t2i(tmp_path):
  folder = tmp_path / 'dataset'
  folder.mkdir()
  (folder / 'color_val.txt').write_bytes(b'a green bench and a blue bowl\r\na red cup.\r\n\r\n')
  (folder / 'complex_val.txt').write_text('The red hat was on top of the rack.\n')
  (folder / 'color_train.txt').write_text('not these\tcolumns\n')
  return folder


@pytest.fixture(name='styles')
def fixture_styles(tmp_path):
  folder = tmp_path / 'benchmark'
  folder.mkdir()
  for number, style in enumerate(hps.STYLES):
    prompts = [f'{style} {"x" * index}' for index in range(number + 1)]
    (folder / f'{style}.json').write_text(json.dumps(prompts))
  (folder / 'drawbench.json').write_text('[]')
  return folder


def test_geneval_layout(pipeline, geneval, tmp_path):
  assert run(geneval, '--format=geneval', f'--output_dir={tmp_path}/out') == 0
  images = tmp_path / 'out' / 'images'
  found = {}
  for folder in os.listdir(images):
    assert folder.isdigit() and len(folder) == 5
    with open(images / folder / 'metadata.jsonl') as file:
      metadata = json.load(file)
    samples = sorted(os.listdir(images / folder / 'samples'))
    assert all(re.match(r'\d+\.png', name) for name in samples)
    found[int(folder)] = metadata
    assert samples == ['0000.png', '0001.png', '0002.png', '0003.png']
    for index, name in enumerate(samples):
      picture = pixels(images / folder / 'samples' / name)
      # Each picture has its own noise.
      np.testing.assert_array_equal(picture, draw(metadata['prompt'], 4 * int(folder) + index))
  assert [found[number] for number in range(3)] == GENEVAL
  line = (images / '00002' / 'metadata.jsonl').read_text()
  assert line == geneval.read_text().splitlines()[2] + '\n'  # Unchanged, with its escapes.


def test_dpg_layout(pipeline, dpg, tmp_path, capsys):
  run(dpg, '--format=dpg', f'--output_dir={tmp_path}/out')
  images = tmp_path / 'out' / 'images'
  assert sorted(os.listdir(images)) == ['0.png', '10.png', 'partiprompts2.png']
  assert f'PIC_NUM=4 bash dpg_bench/dist_eval.sh {images} {fakes.SIZE}' in capsys.readouterr().err
  size = fakes.SIZE
  for number, (name, text) in enumerate(
    (('0', 'a long prompt'), ('10', 'two lines'), ('partiprompts2', 'another'))
  ):
    picture = Image.open(images / f'{name}.png')
    boxes = [(0, 0, size, size), (size, 0, 2 * size, size), (0, size, size, 2 * size)]
    boxes.append((size, size, 2 * size, 2 * size))
    for index, box in enumerate(boxes):
      np.testing.assert_array_equal(np.asarray(picture.crop(box)), draw(text, 4 * number + index))
  run(dpg, '--format=dpg', '--num_images=1', f'--output_dir={tmp_path}/one')
  assert Image.open(tmp_path / 'one' / 'images' / '0.png').size == (size, size)


def test_t2i_compbench_layout(pipeline, t2i, tmp_path):
  run(t2i, '--format=t2i_compbench', f'--output_dir={tmp_path}/out')
  images = tmp_path / 'out' / 'images'
  assert sorted(os.listdir(images)) == ['color', 'complex']
  names = os.listdir(images / 'color' / 'samples')
  names.sort(key=lambda name: int(name.split('_')[-1].split('.')[0]))
  assert [int(name.split('.png')[0].split('_')[1]) for name in names] == list(range(20))
  prompts = [name.split('_')[0] for name in names]
  assert prompts == ['a green bench and a blue bowl'] * 10 + ['a red cup.'] * 10
  assert names[10] == 'a red cup._000010.png'
  np.testing.assert_array_equal(
    pixels(images / 'color' / 'samples' / names[13]), draw('a red cup.', 13)
  )
  first = 'The red hat was on top of the rack._000000.png'
  assert first in os.listdir(images / 'complex' / 'samples')
  # The noise of the first picture of complex is not that of color's.
  np.testing.assert_array_equal(
    pixels(images / 'complex' / 'samples' / first), draw('The red hat was on top of the rack.', 20)
  )


def test_hps_layout(pipeline, styles, tmp_path):
  run(styles, '--format=hps', f'--output_dir={tmp_path}/out')
  images = tmp_path / 'out' / 'images'
  assert sorted(os.listdir(images)) == sorted(hps.STYLES)  # The judge takes each for a style.
  for style in hps.STYLES:
    prompts = json.loads((styles / f'{style}.json').read_text())
    for index in range(len(prompts)):
      with Image.open(images / style / f'{index:05d}.jpg') as picture:
        assert picture.format == 'JPEG' and picture.size == (fakes.SIZE, fakes.SIZE)
  protocol = json.loads((tmp_path / 'out' / 'protocol.json').read_text())
  assert protocol['picture_format'] == 'JPEG, quality 75' and protocol['prompts_drawn'] == 10
  # With several pictures, the best by the ranker, which is the last for the fake one.
  run(styles, '--format=hps', '--num_images=2', f'--output_dir={tmp_path}/best')
  best = pixels(tmp_path / 'best' / 'images' / 'anime' / '00000.jpg')
  assert abs(int(best.mean()) - int(draw('anime ', 1).mean())) <= 1
  pipeline.ranker = None
  with pytest.raises(UserError, match='--num_images=2: HPSv2 has one picture'):
    run(styles, '--format=hps', '--num_images=2', f'--output_dir={tmp_path}/none')


@pytest.mark.parametrize('name', ['geneval', 'dpg', 't2i', 'styles'])
def test_a_stopped_run_resumes(pipeline, name, tmp_path, monkeypatch, request):
  path = request.getfixturevalue(name)
  form = {'t2i': 't2i_compbench', 'styles': 'hps'}.get(name, name)
  flags = [path, f'--format={form}']
  monkeypatch.setattr(drawing, '_AT_ONCE', 1)
  with pipeline.stopped_after(2):
    run(*flags, f'--output_dir={tmp_path}/out')
  run(*flags, f'--output_dir={tmp_path}/out')
  texts = [prompt.text for prompt in registry.BENCHMARKS[form].read(str(path))]
  assert [text for group in pipeline.generated for text in group] == texts
  run(*flags, f'--output_dir={tmp_path}/whole')
  files = {
    folder: {
      file.relative_to(tmp_path / folder): file.read_bytes()
      for file in sorted((tmp_path / folder).rglob('*'))
      if file.is_file()
    }
    for folder in ('out', 'whole')
  }
  assert files['out'] == files['whole']
  with pytest.raises(UserError, match='another run, with seed 0, but this one has 1'):
    run(*flags, '--seed=1', f'--output_dir={tmp_path}/out')


def test_a_prompt_with_a_missing_picture_is_drawn_again(pipeline, geneval, tmp_path):
  flags = [geneval, '--format=geneval', f'--output_dir={tmp_path}/out']
  run(*flags)
  lost = tmp_path / 'out' / 'images' / '00001' / 'samples' / '0002.png'
  before = lost.read_bytes()
  lost.unlink()
  run(*flags)
  assert pipeline.generated[1:] == [['a photo of two cows']] and lost.read_bytes() == before


def test_the_first_prompts_and_then_the_rest(pipeline, geneval, tmp_path, capsys):
  flags = [geneval, '--format=geneval', f'--output_dir={tmp_path}/out']
  run(*flags, '--max_prompts=1')
  assert '1 of 3 prompts; run again without --max_prompts' in capsys.readouterr().err
  run(*flags)
  assert [len(group) for group in pipeline.generated] == [1, 2]
  assert len(os.listdir(tmp_path / 'out' / 'images')) == 3


def test_prompts_that_the_model_cuts_are_named(pipeline, dpg, tmp_path, capsys):
  pipeline.text_length = 10
  run(dpg, '--format=dpg', f'--output_dir={tmp_path}/out')
  assert "reads its beginning: 'a long prompt'" in capsys.readouterr().err
  protocol = json.loads((tmp_path / 'out' / 'protocol.json').read_text())
  assert protocol['prompts_cut'] == ['a long prompt']


def test_a_prompt_that_the_model_cannot_read(pipeline, dpg, tmp_path, monkeypatch):
  encode = pipeline.encode_prompts
  monkeypatch.setattr(
    pipeline,
    'encode_prompts',
    lambda texts: encode(['' if 'two' in text else text for text in texts]),
  )
  with pytest.raises(UserError, match="cannot read the prompt 'two lines': prompt 1 is empty"):
    run(dpg, '--format=dpg', f'--output_dir={tmp_path}/out')
  assert not pipeline.generated and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'form, content, message',
  [
    ('geneval', '', 'has no prompts'),
    ('geneval', '{"prompt": "x"', 'line 1: not JSON'),
    ('geneval', '{"prompt": "x", "include": []}', "line 1: no text 'tag'"),
    ('geneval', '{"prompt": "x", "tag": "y"}', "line 1: no list 'include'"),
    ('geneval', '\n[1]', "line 2: no text 'prompt'"),
    ('dpg', 'text', 'is not a folder; expected the folder dpg_bench/prompts'),
    ('t2i_compbench', 'a cup', 'no category'),
    ('hps', '["a"]', 'no style'),
  ],
)
def test_prompts_of_another_form(pipeline, tmp_path, form, content, message):
  path = tmp_path / 'bad.txt'
  path.write_text(content)
  with pytest.raises(UserError, match=f'bad.txt.*{message}'):
    run(path, f'--format={form}', f'--output_dir={tmp_path}/out')
  assert not pipeline.generated and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'form, name, content, message',
  [
    ('t2i_compbench', 'color_val.txt', 'a red_cup', "line 1: the prompt has '_'"),
    ('t2i_compbench', 'color_val.txt', 'ok\nred/blue', "line 2: the prompt has '/'"),
    ('t2i_compbench', 'color_val.txt', 'x' * 245, 'line 1: the prompt is too long'),
    ('t2i_compbench', 'other.txt', 'x', 'has none of its files'),
    ('dpg', 'a.b.txt', 'x', 'only up to the first dot'),
    ('dpg', 'a.txt', ' \n', 'has no prompt'),
    ('dpg', 'a.md', 'x', 'has no .txt file'),
    ('hps', 'anime.json', '["x"]', 'has no concept-art.json, paintings.json, photo.json'),
  ],
)
def test_folders_of_another_form(pipeline, tmp_path, form, name, content, message):
  (tmp_path / 'prompts').mkdir()
  (tmp_path / 'prompts' / name).write_text(content)
  with pytest.raises(UserError, match=message):
    run(tmp_path / 'prompts', f'--format={form}', f'--output_dir={tmp_path}/out')
  assert not pipeline.generated


@pytest.mark.parametrize('content', ['{}', '[]', '[1]', '["x", ""]', '['])
def test_a_style_that_is_no_list_of_prompts(pipeline, tmp_path, content):
  path = tmp_path / 'photo.json'
  path.write_text(content)
  with pytest.raises(UserError, match=r'photo\.json'):
    run(path, '--format=hps', f'--output_dir={tmp_path}/out')


def test_flags_are_checked_first(pipeline, geneval, dpg, t2i, tmp_path):
  with pytest.raises(
    UserError, match="unknown format 'genval'; choose from parti_prompts, geneval"
  ):
    run(geneval, '--format=genval')
  with pytest.raises(UserError, match='give the file of prompts'):
    run('--format=geneval')
  with pytest.raises(UserError, match='--num_images=3: a picture of DPG-Bench shows 4'):
    run(dpg, '--format=dpg', '--num_images=3')
  with pytest.raises(UserError, match='--num_images=4: the judge of complex takes each 10'):
    run(t2i, '--format=t2i_compbench', '--num_images=4')
  with pytest.raises(UserError, match='generates nothing, so leave out'):
    run(geneval, '--results', 'geneval=x')
  with pytest.raises(UserError, match='leave out --format, and give dpg=PATH'):
    run('--format=dpg', '--results', 'x.txt')
  with pytest.raises(UserError, match='--results x: expected FORMAT=PATH'):
    run('--results', 'x')
  assert not pipeline.generated


# Results, by hand.


def geneval_rows(right):
  """Returns lines of a judge for GENEVAL's prompts and lists of booleans."""
  return ''.join(
    json.dumps(
      {
        'filename': f'images/{number:05d}/samples/{index:04d}.png',
        'tag': row['tag'],
        'prompt': row['prompt'],
        'correct': correct,
        'reason': '',
        'metadata': json.dumps(row),
        'details': '{}',
      }
    )
    + '\n'
    for number, (row, found) in enumerate(zip(GENEVAL, right))
    for index, correct in enumerate(found)
  )


def shown(tmp_path, *results):
  """Returns the files of the results' measurements, with their scores in order."""
  run('--results', *results, f'--output_dir={tmp_path}/table')
  found = []
  for name in (entry.partition('=')[0] for entry in results):
    content = json.loads((tmp_path / 'table' / f'{name}.json').read_text())
    counts = content['protocol']['counts']
    scores = [
      {'name': score, **value, **counts[score]} for score, value in content['values'].items()
    ]
    found.append(content | {'scores': scores, 'benchmark': content['protocol']['benchmark']})
  return found


def test_results_of_geneval(tmp_path, capsys):
  path = tmp_path / 'results.jsonl'
  right = [[True, True, True, False], [True, False, False, False], [False] * 4]
  path.write_text(geneval_rows(right))
  (found,) = shown(tmp_path, f'geneval={path}')
  values = {score['name']: score for score in found['scores']}
  assert values['single_object']['value'] == 75 and values['single_object']['error'] is None
  assert values['counting']['value'] == 12.5 and values['counting']['pictures'] == 8
  # Over the prompts' shares 1/4 and 0: their deviation over the root of two.
  assert values['counting']['error'] == pytest.approx(100 * np.std([0.25, 0], ddof=1) / 2**0.5)
  assert values['overall']['value'] == pytest.approx((75 + 12.5) / 2)
  assert list(values)[-1] == 'overall' and values['overall']['prompts'] == 3
  assert any('published set has 553' in remark for remark in found['remarks'])
  assert any('overall is without two_object' in remark for remark in found['remarks'])
  printed = capsys.readouterr().out
  assert re.search(r'GenEval +counting +% +12\.50 ± 12\.50 +2 +8', printed)
  assert '| GenEval | overall | % | 43.75 |' in (tmp_path / 'table' / 'results.md').read_text()


def test_results_of_an_unfinished_geneval(tmp_path):
  path = tmp_path / 'results.jsonl'
  path.write_text(geneval_rows([[True], [True, False], [False, False]]))
  (found,) = shown(tmp_path, f'geneval={path}')
  assert any('some prompts have 1 picture and others up to 2' in r for r in found['remarks'])
  path.write_text(geneval_rows([[True]]) * 2)
  with pytest.raises(UserError, match=r'line 2: images/00000/samples/0000.png was judged before'):
    shown(tmp_path, f'geneval={path}')


def test_equal_prompts_and_other_tasks_of_geneval(tmp_path):
  row = {'tag': 'counting', 'prompt': 'two cats', 'include': []}
  other = {'tag': 'mood', 'prompt': 'a glad cat', 'include': []}
  lines = [
    json.dumps(
      {
        'filename': f'images/{number:05d}/samples/{index:04d}.png',
        'tag': of_prompt['tag'],
        'correct': number > 0,
        'metadata': json.dumps(of_prompt),
      }
    )
    for number, of_prompt in enumerate([row, row, other])
    for index in range(4)
  ]
  path = tmp_path / 'results.jsonl'
  # The order of a judge's lines means nothing.
  path.write_text('\n'.join(np.random.default_rng(0).permutation(lines)))
  (found,) = shown(tmp_path, f'geneval={path}')
  values = {score['name']: score for score in found['scores']}
  assert values['counting']['value'] == 50 and values['counting']['prompts'] == 2
  assert values['counting']['error'] == pytest.approx(50)
  assert not any('interrupted' in remark for remark in found['remarks'])
  assert any("overall has mood, which aren't its tasks" in r for r in found['remarks'])


@pytest.mark.parametrize(
  'form, content, message',
  [
    ('dpg', '/a.png, 7.0, 7.0\n', 'shares from 0 to 1'),
    ('dpg', 'L1 category scores:\n\tentity: 1e999\n/a.png, 1.0, 1.0\n', '1e999 is not a number'),
    ('hps', 'anime 28.1000 \t0.2\nphoto 27.0\nAverage 99.0\n', 'average 99 is not among'),
  ],
)
def test_impossible_results(tmp_path, form, content, message):
  path = tmp_path / 'results.txt'
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    run('--results', f'{form}={path}', f'--output_dir={tmp_path}/table')


def test_a_category_of_dpg_without_answers_is_told(tmp_path):
  path = tmp_path / 'results.txt'
  path.write_text('/a.png, 1.0, 1.0\nL1 category scores:\n\tentity: 50.0\n\tglobal: nan\n')
  (found,) = shown(tmp_path, f'dpg={path}')
  assert [score['name'] for score in found['scores']] == ['entity', 'overall']
  assert any('no score of global' in remark for remark in found['remarks'])


@pytest.mark.parametrize(
  'names, answer, message',
  [
    (['a_000000.png', 'b_000000.png'], 0.5, 'two pictures of number 0'),
    (['a_000000.png'], 50, 'answer, at most 1'),
  ],
)
def test_impossible_results_of_t2i_compbench(tmp_path, names, answer, message):
  samples, judged = tmp_path / 'color' / 'samples', tmp_path / 'color' / 'annotation_blip'
  samples.mkdir(parents=True)
  judged.mkdir()
  for name in names:
    (samples / name).touch()
  (judged / 'vqa_result.json').write_text(json.dumps([{'question_id': 0, 'answer': answer}]))
  with pytest.raises(UserError, match=message):
    run('--results', f't2i_compbench={tmp_path}', f'--output_dir={tmp_path}/table')


def test_results_of_dpg(tmp_path):
  path = tmp_path / 'dpg-bench_1_results.txt'
  path.write_text(
    'out/images, of mine/0.png, 1.0, 0.5, 0.5, 0.0, 0.5\n'
    'out/images, of mine/10.png, 1.0, 1.0, 1.0, 0.75, 0.9375\n'
    'Model: images\n'
    'L1 category scores:\n\tentity: 80.0\n\trelation: 62.5\n'
    'L2 category scores:\n\tentity - whole: 80.0\n\trelation - spatial: 62.5\n'
    'Image path: out/images, of mine\n'
    'Save results to: out/dpg-bench_1_results.txt\n'
    'DPG-Bench score: 71.875\n'
  )
  (found,) = shown(tmp_path, f'dpg={path}')
  values = {score['name']: score for score in found['scores']}
  assert list(values) == ['entity', 'relation', 'overall']
  assert values['overall']['value'] == 71.875 and values['overall']['prompts'] == 2
  assert values['overall']['pictures'] == 8
  expected = 100 * np.std([0.5, 0.9375], ddof=1) / 2**0.5
  assert values['overall']['error'] == pytest.approx(expected)
  assert values['entity']['value'] == 80
  text = path.read_text()
  lost = tmp_path / 'lost.txt'
  lost.write_text('\n'.join(text.splitlines()[1:]))
  with pytest.raises(
    UserError, match=r'states 71.8750, but the pictures in it have the mean 93.75'
  ):
    shown(tmp_path, f'dpg={lost}')
  lost.write_text('\n'.join(text.splitlines()[:2]))
  (found,) = shown(tmp_path, f'dpg={lost}')
  assert any('has not finished' in remark for remark in found['remarks'])
  lost.write_text('out/0.png, 1.0, 0.5, 0.9\n')
  with pytest.raises(UserError, match='line 1: not a path, its scores and their mean'):
    shown(tmp_path, f'dpg={lost}')


def judged(folder, place, answers):
  """Writes a judge's results of T2I-CompBench."""
  (folder / place).mkdir(parents=True)
  rows = [{'question_id': number, 'answer': answer} for number, answer in answers.items()]
  (folder / place / 'vqa_result.json').write_text(json.dumps(rows))


def test_results_of_t2i_compbench(pipeline, t2i, tmp_path):
  run(t2i, '--format=t2i_compbench', f'--output_dir={tmp_path}/out')
  images = tmp_path / 'out' / 'images'
  answers = {number: f'{0.9 if number < 10 else 0.3:.4f}' for number in range(20)}
  judged(images / 'color', 'annotation_blip', answers)
  (found,) = shown(tmp_path, f't2i_compbench={images}')
  (score,) = found['scores']
  assert score['name'] == 'color (BLIP-VQA)' and score['value'] == pytest.approx(0.6)
  assert score['error'] == pytest.approx(np.std([0.9, 0.3], ddof=1) / 2**0.5)
  assert score['prompts'] == 2 and score['pictures'] == 20
  assert any('so complex has no score (3-in-1)' in remark for remark in found['remarks'])
  judged(images / 'complex', 'annotation_3_in_1', {0: 0.5, 1: 1.0, 25: 0.5})
  with pytest.raises(UserError, match='score of picture 25, which .*complex/samples lacks'):
    shown(tmp_path, f't2i_compbench={images}')
  (images / 'complex/annotation_3_in_1/vqa_result.json').write_text(
    '[{"question_id": 0, "answer": NaN}]'
  )
  with pytest.raises(UserError, match='vqa_result.json: damaged'):
    shown(tmp_path, f't2i_compbench={images}')


@pytest.mark.parametrize('model', ['images ', ' ', ''])
def test_results_of_hps(tmp_path, model):
  path = tmp_path / 'hps.txt'
  path.write_text(
    'Loading model ...\n-----------benchmark score ---------------- \n'
    f'{model}{"anime":<15} 27.31 \t 0.3000\n{model}{"photo":<15} 26.00 \t 0.0600\n'
    f'{model}{"Average":<15} 26.66 \t\n'
  )
  (found,) = shown(tmp_path, f'hps={path}')
  values = {score['name']: score for score in found['scores']}
  assert values['anime']['value'] == 27.31 and values['average']['value'] == 26.66
  # NumPy's deviation of ten groups; the error of their mean is that over the root of nine.
  assert values['anime']['error'] == pytest.approx(0.1)
  assert any('the average is without concept-art, paintings' in r for r in found['remarks'])
  path.write_text(path.read_text().replace('Average', 'Mean'))
  with pytest.raises(UserError, match='has no Average'):
    shown(tmp_path, f'hps={path}')


def test_results_of_several_benchmarks_are_one_table(tmp_path, capsys):
  (tmp_path / 'results.jsonl').write_text(geneval_rows([[True], [True], [False]]))
  (tmp_path / 'hps.txt').write_text(f'{"photo":<15} 26.00 \t 0.0600\n{"Average":<15} 26.00 \t\n')
  found = shown(tmp_path, f'hps={tmp_path}/hps.txt', f'geneval={tmp_path}/results.jsonl')
  assert [entry['benchmark'] for entry in found] == ['HPSv2', 'GenEval']
  printed = capsys.readouterr().out
  assert printed.index('HPSv2') < printed.index('GenEval')


@pytest.mark.parametrize('form', registry.BENCHMARKS)
@pytest.mark.parametrize('content', [b'', b'nothing\n', b'\xff\xfe\x00', b'[1, 2]'])
def test_results_of_something_else(tmp_path, form, content):
  path = tmp_path / 'results'
  path.write_bytes(content)
  with pytest.raises(UserError, match=f'--results {path}'):
    run('--results', f'{form}={path}', f'--output_dir={tmp_path}/table')
  with pytest.raises(UserError, match='--results .*missing'):
    run('--results', f'{form}={tmp_path}/missing', f'--output_dir={tmp_path}/table')
  assert not (tmp_path / 'table').exists()


def test_results_know_the_run_that_drew_the_pictures(pipeline, geneval, tmp_path):
  run(geneval, '--format=geneval', '--seed=3', '--top_p=0.5', f'--output_dir={tmp_path}/out')
  text = geneval_rows([[True] * 4, [False] * 4, [False] * 4])
  for place in ('out', 'out/images', 'elsewhere'):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / 'results.jsonl').write_text(text)
    (found,) = shown(tmp_path, f'geneval={tmp_path}/{place}/results.jsonl')
    subject, protocol = found['subject'], found['protocol']
    if place == 'elsewhere':
      assert set(subject) == {'results'} and 'num_images' not in protocol
    else:
      assert subject['seed'] == 3 and subject['sampling'] == {'top_p': 0.5}
      assert subject['model_name'] == 'fake' and subject['prompts_cut'] == 0
      assert protocol['num_images'] == 4 and protocol['prompts_drawn'] == 3
  # A run of another benchmark is not that run.
  (tmp_path / 'out' / 'hps.txt').write_text(
    f'{"photo":<15} 26.00 \t 0.0600\n{"Average":<15} 26.00 \t\n'
  )
  (found,) = shown(tmp_path, f'hps={tmp_path}/out/hps.txt')
  assert 'seed' not in found['subject']


def test_measurements_can_be_compared(tmp_path):
  for name, right in (('a', [[True], [True], [False]]), ('b', [[True], [False], [False]])):
    (tmp_path / f'{name}.jsonl').write_text(geneval_rows(right))
    run('--results', f'geneval={tmp_path}/{name}.jsonl', f'--output_dir={tmp_path}/{name}')
  paths = (str(tmp_path / 'a' / 'geneval.json'), str(tmp_path / 'b' / 'geneval.json'))
  text = measurement.compare(paths).text()
  assert re.search(r'counting .*50\.0000 ± 50\.0000 .* 0\.0000 ± 0\.0000 ', text)
  (tmp_path / 'b.jsonl').write_text(geneval_rows([[True], [False]]))
  run('--results', f'geneval={tmp_path}/b.jsonl', f'--output_dir={tmp_path}/b')
  with pytest.raises(
    UserError, match=r'not measured by the same protocol.*counts\.counting\.prompts'
  ):
    measurement.compare(paths)


def test_errors_of_means_with_unequal_numbers_of_pictures():
  from parti_jax.evaluation.benchmarks import base

  values = {'a': [1.0, 0.0], 'b': [1.0], 'c': [0.0, 0.0, 1.0]}
  found = base.over_prompts(values)
  assert found.mean == 0.5
  sums, counts = np.array([1.0, 1, 1]), np.array([2.0, 1, 3])
  residuals = sums - found.mean * counts
  assert found.error == pytest.approx(np.sqrt(3 / 2 * np.sum(residuals**2)) / counts.sum())
