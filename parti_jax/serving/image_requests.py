"""Reads and checks requests for pictures, in the form of OpenAI's images endpoints.

Fields that would change a picture there and can't here are refused rather than ignored.
"""

from __future__ import annotations

import dataclasses
import io
import json
import secrets
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from PIL import Image

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.data.undecodable import UndecodablePicture
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import editing

# Fields of SamplingSettings that a request may have. Slots can't sample with the others.
SAMPLING = (
  'guidance_scale',
  'guidance_ramp',
  'guidance_start',
  'temperature',
  'top_k',
  'top_p',
)
# Fields of OpenAI's interface that have no effect here -> the values that need none; None is any
# string.
_WITHOUT_EFFECT: dict[str, tuple[str, ...] | None] = {
  'background': ('auto', 'opaque'),
  'output_format': ('png',),
  'quality': ('auto', 'standard'),
  'user': None,
}
# Fields that are JSON in a form, too.
_NUMBERS = (
  'guidance_scale',
  'guidance_start',
  'n',
  'partial_images',
  'rank',
  'seed',
  'stream',
  'temperature',
  'top_k',
  'top_p',
  'vary',
)
# Fields whose null means that they are absent.
_FIELDS = (
  'model',
  'n',
  'negative_prompt',
  'partial_images',
  'prompt',
  'rank',
  'response_format',
  'seed',
  'size',
  'stream',
  *SAMPLING,
  *_WITHOUT_EFFECT,
)

# Fields of edits besides these, and the fields with files.
_EDITING = ('keep', 'vary')
FILES = ('image', 'mask')


class RequestError(UserError):
  """A request that is refused.

  Attributes:
    status: the status code of HTTP.
    field: the field at fault; None if several are.
    code: a short name of the reason for programs; None if there is none.
  """

  def __init__(
    self, message: str, status: int = 400, field: str | None = None, code: str | None = None
  ):
    super().__init__(' '.join(message.split()))
    self.status = status
    self.field = field
    self.code = code


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one client may ask for, and what all may together.

  Attributes:
    images: number of pictures of a request.
    prompt: number of characters of a prompt.
    body: number of bytes of a request without files.
    files: number of bytes of a request with files.
    pixels: number of pixels of a picture in a request.
    queue: number of pictures, of all clients, that wait for a slot.
    seconds: time from a request to its last picture.
    body_seconds: time that a client may take to send a request.
    connections: number of open connections.
  """

  images: int = 16
  prompt: int = 4000
  body: int = 1 << 16
  files: int = 1 << 23
  pixels: int = 1 << 24
  queue: int = 256
  seconds: float = 600.0
  body_seconds: float = 20.0
  connections: int = 1024

  def __post_init__(self):
    for name in ('images', 'prompt', 'body', 'files', 'pixels', 'queue', 'connections'):
      checks.count(name, getattr(self, name))
    for name in ('seconds', 'body_seconds'):
      if checks.number(name, getattr(self, name), 0) == 0:
        raise UserError(f'{name}=0 leaves no time; choose a larger number')


@dataclasses.dataclass(frozen=True)
class Offer:
  """What a served model can do, by which requests are checked.

  Attributes:
    model: its name.
    size: height and width of its pictures, in pixels; one number for squares.
    grid: rows and columns of their image tokens.
    upscaled: those of its enlarged pictures; None if it has no super-resolution.
    ranked: whether it has a ranker.
  """

  model: str
  size: image_sizes.ImageSize
  grid: tuple[int, int]
  upscaled: image_sizes.ImageSize | None
  ranked: bool

  def pixels(self, upscaled: bool = False) -> str:
    """Returns width and height of its pictures, or of enlarged ones, as a request's 'size' has them."""
    size = self.upscaled if upscaled else self.size
    assert size is not None
    height, width = image_sizes.sides(size)
    return f'{width}x{height}'

  def shown(self, upscaled: bool = False) -> str:
    """Returns `pixels` for people to read."""
    return self.pixels(upscaled).replace('x', '×')


@dataclasses.dataclass(frozen=True)
class ImageRequest:
  """Pictures to draw for a prompt.

  Attributes:
    prompt: the prompt.
    num_images: number of pictures.
    seed: the seed of all; the pictures have the indices from 0 on, as those of `generate`.
    rank: whether to sort them by the ranker's score, best first.
    upscale: whether to enlarge them.
    previews: number of previews of each picture; None for one after each row of image tokens, and 0
      for none.
    stream: whether to answer with events.
    sampling: fields of SamplingSettings, without those that keep the default.
    negative: the text on guidance's other side; None for the empty text.
    edit: the picture to edit, and what to keep of it; None to draw all of the picture.
  """

  prompt: str
  num_images: int = 1
  seed: int = 0
  rank: bool = False
  upscale: bool = False
  previews: int | None = 0
  stream: bool = False
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  negative: str | None = None
  edit: editing.Edit | None = None


def parse(body: bytes, offer: Offer, limits: Limits) -> ImageRequest:
  """Reads the body of a request.

  Args:
    body: JSON.
    offer: what the model can do.
    limits: what a client may ask for.

  Raises:
    RequestError: if anything is wrong with it; the message names the field.
  """
  return checked(_object(body), offer, limits)


def parse_form(
  texts: Mapping[str, str], files: Mapping[str, bytes], offer: Offer, limits: Limits
) -> ImageRequest:
  """Reads the fields of a form, a request for edits.

  Args:
    texts: the fields that aren't files. Those that are neither text nor empty are JSON.
    files: the files: 'image', and perhaps 'mask'.
    offer: what the model can do.
    limits: what a client may ask for.

  Raises:
    RequestError: if anything is wrong with it; the message names the field.
  """
  fields: dict[str, Any] = {}
  for name, value in texts.items():
    fields[name] = None if value == '' and name != 'prompt' else value
    if name in _NUMBERS:
      try:
        fields[name] = json.loads(value or 'null')
      except (ValueError, RecursionError):
        pass  # What reads the field says what is wrong with it.
  for name in files.keys() - set(FILES):
    raise RequestError(f'{checks.shown_as_json(name)} is not a file of an edit', field=name[:80])
  if 'image' not in files:
    raise RequestError('image is missing, the file of the picture to edit', field='image')
  images = {name: _uploaded(name, data, limits) for name, data in files.items()}
  return checked(fields, offer, limits, images)


def checked(
  fields: Mapping[str, Any],
  offer: Offer,
  limits: Limits,
  images: Mapping[str, Image.Image] | None = None,
) -> ImageRequest:
  """Checks the fields of a request.

  Args:
    fields: the fields, as in its JSON.
    offer: what the model can do.
    limits: what a client may ask for.
    images: of a request for edits, 'image' and perhaps 'mask'; None for other requests.

  Raises:
    RequestError: if anything is wrong with them; the message names the field.
  """
  known = _FIELDS if images is None else (*_FIELDS, *_EDITING)
  unknown = sorted(fields.keys() - set(known))
  if unknown:
    name = checks.shown_as_json(unknown[0])
    raise RequestError(
      f'unknown field {name}; the fields are {", ".join(sorted(known))}', field=unknown[0][:80]
    )
  fields = {name: value for name, value in fields.items() if value is not None}
  for name, allowed in _WITHOUT_EFFECT.items():
    if name in fields and allowed:
      _choice(name, fields[name], allowed)
    elif name in fields:
      _checked(name, checks.text, fields[name])
  _model(fields.get('model', offer.model), offer)
  if 'response_format' in fields:
    _choice('response_format', fields['response_format'], ('b64_json',))
  number = lambda name, default, least, most: _checked(
    name, checks.whole_number, fields.get(name, default), least, most
  )
  flag = lambda name: _checked(name, checks.boolean, fields.get(name, False))
  stream = flag('stream')
  if 'partial_images' in fields and not stream:
    raise RequestError('partial_images needs stream=true', field='partial_images')
  previews = None if stream else 0
  if 'partial_images' in fields:
    previews = number('partial_images', 0, 0, checks.LARGEST_INT32)
  if flag('rank') and not offer.ranked:
    raise RequestError(f'rank=true: the model {offer.model} has no ranker', field='rank')
  return ImageRequest(
    _prompt(fields, limits),
    number('n', 1, 1, limits.images),
    number('seed', secrets.randbits(32), 0, sampling_settings.LARGEST_SEED),
    flag('rank'),
    _upscale(fields.get('size', 'auto'), offer),
    previews,
    stream,
    _sampling(fields),
    _negative(fields, limits),
    None if images is None else _edit(fields, images, offer),
  )


def _object(body: bytes) -> dict[str, Any]:
  """Parses JSON that must be an object."""

  def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      raise ValueError('a field is there twice')
    return found

  def refuse(constant: str):
    raise ValueError(f'{constant} is not JSON')

  try:
    found = json.loads(body.decode(), object_pairs_hook=once, parse_constant=refuse)
  except (ValueError, RecursionError) as error:
    reason = 'it is nested too deeply' if isinstance(error, RecursionError) else str(error)
    raise RequestError(f'the body is not JSON in UTF-8: {reason[:200]}') from None
  if not isinstance(found, dict):
    raise RequestError('the body must be a JSON object, such as {"prompt": "red apple"}')
  return found


def _checked(name: str, check, value: Any, *bounds: float | None) -> Any:
  """Applies a function of `checks`; its error becomes that of the request's field."""
  try:
    return check(name, value, *bounds, show=checks.shown_as_json)
  except UserError as error:
    raise RequestError(str(error), field=name) from None


def _choice(name: str, value: Any, allowed: Sequence[str]) -> None:
  if value not in allowed:
    raise RequestError(
      f'{name}={checks.shown_as_json(value)} is not possible here; leave it out, or choose '
      f'{" or ".join(allowed)}',
      field=name,
    )


def _model(name: Any, offer: Offer) -> None:
  if name != offer.model:
    raise RequestError(
      f'model={checks.shown_as_json(name)} is not served; the model here is {offer.model}',
      404,
      'model',
      'model_not_found',
    )


def _prompt(fields: Mapping[str, Any], limits: Limits) -> str:
  if 'prompt' not in fields:
    raise RequestError('prompt is missing; say what the picture should show', field='prompt')
  prompt = _text('prompt', fields['prompt'], limits)
  if not prompt.strip():
    raise RequestError('prompt is empty; say what the picture should show', field='prompt')
  return prompt


def _negative(fields: Mapping[str, Any], limits: Limits) -> str | None:
  """Returns the negative prompt; an empty one is none."""
  negative = _text('negative_prompt', fields.get('negative_prompt', ''), limits)
  return negative if negative.strip() else None


def _text(name: str, value: Any, limits: Limits) -> str:
  text = _checked(name, checks.text, value)
  if len(text) > limits.prompt:
    raise RequestError(
      f'{name} has {len(text):,} characters; at most {limits.prompt:,} are allowed', field=name
    )
  try:
    checks.texts(name, text)
  except UserError as error:
    raise RequestError(str(error), field=name) from None
  return text


def _uploaded(name: str, data: bytes, limits: Limits) -> Image.Image:
  """Decodes a file that a client sent; what is transparent stays so."""
  try:
    header = image_decoding.header(data)
    if header.width * header.height > limits.pixels:
      raise RequestError(
        f'{name} has {header.width}×{header.height} pixels, more than {limits.pixels:,}', field=name
      )
    whole, _ = image_decoding.decode_whole(data)  # Refuses what is damaged.
    with Image.open(io.BytesIO(data), formats=image_decoding.FORMATS) as image:
      if not _is_transparent(image):
        return whole
      turned = image_decoding.upright(image.convert('RGBA'), image)
      return turned if turned.size == whole.size else whole
  except UndecodablePicture as error:
    raise RequestError(f'{name}: {error}; send a PNG, JPEG, WebP or GIF', field=name) from None


def _is_transparent(image: Image.Image) -> bool:
  return image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info


def _edit(
  fields: Mapping[str, Any], images: Mapping[str, Image.Image], offer: Offer
) -> editing.Edit | None:
  """Returns what to keep of the picture of a request."""
  image, mask = images['image'], images.get('mask')
  keep, vary = fields.get('keep'), fields.get('vary')
  if mask is None and keep is None and vary is None and _is_transparent(image):
    mask = image
  try:
    return editing.edit(image, mask, keep, vary, offer.size, offer.grid)
  except UserError as error:
    raise RequestError(str(error), field='image') from None


def _upscale(size: Any, offer: Offer) -> bool:
  """Returns whether pictures of this size are enlarged ones."""
  sizes = {'auto': False, offer.pixels(): False}
  if offer.upscaled is not None:
    sizes[offer.pixels(upscaled=True)] = True
  if not isinstance(size, str) or size not in sizes:
    raise RequestError(
      f'size={checks.shown_as_json(size)} is not possible with the model {offer.model}; choose '
      f'{" or ".join(sizes)}',
      field='size',
    )
  return sizes[size]


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of SamplingSettings, each checked by itself."""
  found = {name: fields[name] for name in SAMPLING if name in fields}
  for name, value in found.items():
    try:
      sampling_settings.SamplingSettings(**{name: value})
    except UserError as error:
      raise RequestError(str(error), field=name) from None
  return found
