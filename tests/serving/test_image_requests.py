"""What a request may say, and what is refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.serving import image_requests

LIMITS = image_requests.Limits(images=4, prompt=40)
PLAIN = image_requests.Offer('tiny', 64, (8, 8), None, False)
RICH = image_requests.Offer('tiny', 64, (8, 8), 256, True)


def parse(offer=RICH, **fields):
  return image_requests.parse(json.dumps(fields).encode(), offer, LIMITS)


def test_a_prompt_is_enough():
  found = parse(PLAIN, prompt='red apple')
  assert found == image_requests.ImageRequest('red apple', seed=found.seed)
  # Nobody asked for a seed, so pictures differ.
  assert len({parse(prompt='red apple').seed for _ in range(8)}) > 1


def test_every_field_is_read():
  found = parse(
    prompt=' red apple ',
    model='tiny',
    n=3,
    seed=2**32 - 1,
    size='256x256',
    rank=True,
    stream=True,
    partial_images=2,
    response_format='b64_json',
    output_format='png',
    quality='auto',
    background='opaque',
    user='anyone',
    guidance_scale=2,
    guidance_ramp='cosine',
    guidance_start=1.5,
    temperature=0.5,
    top_k=3,
    top_p=0.9,
    negative_prompt='pear',
  )
  assert found == image_requests.ImageRequest(
    ' red apple ',
    3,
    2**32 - 1,
    True,
    True,
    2,
    True,
    {
      'guidance_scale': 2,
      'guidance_ramp': 'cosine',
      'guidance_start': 1.5,
      'temperature': 0.5,
      'top_k': 3,
      'top_p': 0.9,
    },
    'pear',
  )


def test_null_is_absent():
  found = parse(prompt='red apple', n=None, seed=None, size=None, stream=None, top_k=None)
  assert (found.num_images, found.upscale, found.stream, found.sampling) == (1, False, False, {})


def test_a_stream_previews_every_row_unless_told_otherwise():
  assert parse(prompt='a', stream=True).previews is None
  assert parse(prompt='a', stream=True, partial_images=0).previews == 0
  assert parse(prompt='a').previews == 0


@pytest.mark.parametrize(
  'fields, message',
  [
    ({}, 'prompt is missing'),
    ({'prompt': 7}, 'prompt=7 must be a string'),
    ({'prompt': ['red apple']}, r"prompt=\['red apple'\] must be a string"),
    ({'prompt': ' \n'}, 'prompt is empty'),
    ({'prompt': 'x' * 41}, 'prompt has 41 characters; at most 40'),
    ({'prompt': '\ud800'}, 'characters that are not Unicode'),
    ({'negative_prompt': 7}, 'negative_prompt=7 must be a string'),
    ({'negative_prompt': 'x' * 41}, 'negative_prompt has 41 characters'),
    ({'keep': 'top:0.5'}, "unknown field 'keep'"),
    ({'n': 0}, 'n=0 must be a whole number from 1 to 4'),
    ({'n': 5}, 'n=5 must be'),
    ({'n': 1.5}, 'n=1.5 must be'),
    ({'n': '2'}, "n='2' must be"),
    ({'n': True}, 'n=true must be'),
    ({'n': 10**400}, 'n=.* must be'),
    ({'seed': -1}, 'seed=-1 must be'),
    ({'seed': 2**32}, 'seed=4294967296 must be'),
    ({'size': '1024x1024'}, "size='1024x1024' is not possible .*; choose auto or 64x64 or 256x256"),
    ({'size': 64}, 'size=64 is not possible'),
    ({'size': []}, r'size=\[\] is not possible'),
    ({'model': 'dall-e-3'}, "model='dall-e-3' is not served; the model here is tiny"),
    ({'response_format': 'url'}, "response_format='url' is not possible here"),
    ({'output_format': 'webp'}, 'output_format=.* choose png'),
    ({'quality': 'hd'}, 'quality=.* choose auto or standard'),
    ({'background': 'transparent'}, 'background='),
    ({'user': 3}, 'user=3 must be a string'),
    ({'rank': 'yes'}, "rank='yes' must be true or false"),
    ({'stream': 1}, 'stream=1 must be true or false'),
    ({'partial_images': 2}, 'partial_images needs stream=true'),
    ({'partial_images': -1, 'stream': True}, 'partial_images=-1 must be'),
    ({'temperature': -1}, 'temperature=-1 is negative'),
    ({'temperature': 'hot'}, "temperature='hot' must be a number"),
    ({'guidance_scale': 1e300}, 'guidance_scale=.* is not a finite number'),
    ({'guidance_scale': [2]}, r'guidance_scale=\[2\] must be a number'),
    ({'top_p': 0}, 'top_p=0 must be above 0'),
    ({'top_k': -1}, 'top_k=-1 must be'),
    ({'guidance_ramp': '../etc'}, 'guidance_ramp=.* is not one of constant'),
    ({'exit_threshold': 0.5}, "unknown field 'exit_threshold'"),
    ({'style': 'vivid'}, "unknown field 'style'; the fields are background, "),
    ({'a\nb' * 99: 1}, 'unknown field'),
  ],
)
def test_what_is_refused_is_named_in_one_line(fields, message):
  with pytest.raises(image_requests.RequestError, match=message) as caught:
    parse(**{'prompt': 'red apple'} | fields if fields else {})
  assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
  assert caught.value.status == (404 if 'model' in fields else 400)
  name = next(iter(fields), 'prompt')
  assert caught.value.field == name[:80]


def test_what_the_model_lacks_is_refused():
  with pytest.raises(image_requests.RequestError, match='the model tiny has no ranker'):
    parse(PLAIN, prompt='a', rank=True)
  with pytest.raises(image_requests.RequestError, match='choose auto or 64x64$'):
    parse(PLAIN, prompt='a', size='256x256')


@pytest.mark.parametrize(
  'body',
  [
    b'',
    b'null',
    b'[]',
    b'"red apple"',
    b'{"prompt": "a"',
    b'{"prompt": "a"} {}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "n": ' + b'9' * 5000 + b'}',
    b'{"prompt": "\xff"}',
    '{"prompt": "a"}'.encode('utf-16'),
    b'[' * 60_000,
    b'{"a":' * 12_000,
  ],
)
def test_bodies_that_are_no_request(body):
  with pytest.raises(image_requests.RequestError) as caught:
    image_requests.parse(body, RICH, LIMITS)
  assert caught.value.status == 400 and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
  'limits', [{'images': 0}, {'queue': -1}, {'seconds': 0}, {'body_seconds': float('nan')}]
)
def test_limits_that_cannot_be(limits):
  with pytest.raises(UserError, match=next(iter(limits))):
    image_requests.Limits(**limits)


def file_of(pixels, mode='RGB', kind='PNG'):
  content = io.BytesIO()
  Image.fromarray(np.asarray(pixels, np.uint8)).convert(mode).save(content, kind)
  return content.getvalue()


PICTURE = file_of(np.random.default_rng(0).integers(0, 256, (64, 64, 3)))


def parse_form(image=PICTURE, mask=None, **texts):
  files = {name: data for name, data in (('image', image), ('mask', mask)) if data is not None}
  return image_requests.parse_form({'prompt': 'red apple'} | texts, files, RICH, LIMITS)


def test_a_form_is_read_like_json():
  found = parse_form(
    keep='top:0.5', n='3', seed='7', temperature='0.5', rank='true', stream='true', size='', user=''
  )
  assert (found.num_images, found.seed, found.rank, found.stream) == (3, 7, True, True)
  assert found.sampling == {'temperature': 0.5} and found.previews is None and not found.upscale
  assert found.edit.how == 'keep=top:0.5' and found.edit.kept[:4].all()
  assert not found.edit.kept[4:].any()
  np.testing.assert_array_equal(found.edit.image, np.asarray(Image.open(io.BytesIO(PICTURE))))
  assert parse_form(vary='0.25').edit.vary == 0.25


def test_what_a_mask_marks_is_redrawn():
  marked = np.zeros([64, 64], np.uint8)
  marked[8:16, 16:32] = 255
  kept = np.ones([8, 8], bool)
  kept[1, 2:4] = False
  white = file_of(marked)
  np.testing.assert_array_equal(parse_form(mask=white).edit.kept, kept)
  # As OpenAI's masks are, and as a picture may be without a mask.
  pixels = np.dstack([np.full([64, 64, 3], 99), 255 - marked])
  content = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8), 'RGBA').save(content, 'PNG')
  transparent = content.getvalue()
  np.testing.assert_array_equal(parse_form(mask=transparent).edit.kept, kept)
  np.testing.assert_array_equal(parse_form(image=transparent).edit.kept, kept)


@pytest.mark.parametrize('orientation', [3, 6, 8])
def test_a_transparent_picture_is_turned_as_its_file_says(orientation):
  pixels = np.full([64, 64, 4], 255, np.uint8)
  pixels[8:16, 16:32, 3] = 0
  turned = {3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1), 8: np.rot90}[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  content = io.BytesIO()
  Image.fromarray(pixels, 'RGBA').save(content, 'PNG', exif=exif)
  kept = np.ones([8, 8], bool)
  kept[1, 2:4] = False
  np.testing.assert_array_equal(parse_form(mask=content.getvalue()).edit.kept, turned(kept))
  np.testing.assert_array_equal(parse_form(image=content.getvalue()).edit.kept, turned(kept))


@pytest.mark.parametrize(
  'form, field, message',
  [
    ({}, 'image', 'image needs one of mask'),
    ({'image': None}, 'image', 'image is missing'),
    ({'image': b''}, 'image', 'no picture'),
    ({'image': b'/etc/passwd'}, 'image', 'unknown picture format; send a PNG'),
    ({'image': PICTURE[:200], 'keep': 'top:0.5'}, 'image', 'damaged'),
    ({'image': file_of(np.zeros([3000, 6000, 3])), 'vary': '1'}, 'image', '6000×3000 pixels, more'),
    ({'mask': b'x'}, 'mask', 'mask: unknown picture format'),
    ({'mask': file_of(np.zeros([64, 64]))}, 'image', 'marks nothing'),
    ({'mask': file_of(np.zeros([32, 32]))}, 'image', 'must have the same size'),
    ({'keep': 'middle:0.5'}, 'image', 'keep='),
    ({'keep': 'top:0.5', 'vary': '0.5'}, 'image', 'keep, vary given'),
    ({'vary': 'much'}, 'image', "vary='much'"),
    ({'keep': 'top:0.5', 'n': 'three'}, 'n', "n='three' must be a whole number"),
    ({'keep': 'top:0.5', 'prompt': ''}, 'prompt', 'prompt is empty'),
    ({'keep': 'top:0.5', 'path': '/etc/passwd'}, 'path', "unknown field 'path'"),
  ],
)
def test_edits_that_are_refused(form, field, message):
  with pytest.raises(image_requests.RequestError, match=message) as caught:
    parse_form(**form)
  assert caught.value.field == field and caught.value.status == 400
  assert len(str(caught.value).splitlines()) == 1
