"""Reads and checks requests for pictures, in the form of OpenAI's images endpoint.

Fields that would change a picture there and can't here are refused rather than ignored.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.exported_model import sampling_settings

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
# Fields whose null means that they are absent.
_FIELDS = (
  'model',
  'n',
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


class RequestError(UserError):
  """A request that is refused.

  Attributes:
    status: the status code of HTTP.
    field: the field at fault; None if there is no single one.
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
    body: number of bytes of a request.
    queue: number of pictures, of all clients, that wait for a slot.
    seconds: time from a request to its last picture.
    body_seconds: time that a client may take to send a request.
    connections: number of open connections.
  """

  images: int = 16
  prompt: int = 4000
  body: int = 1 << 16
  queue: int = 256
  seconds: float = 600.0
  body_seconds: float = 20.0
  connections: int = 1024

  def __post_init__(self):
    for name in ('images', 'prompt', 'body', 'queue', 'connections'):
      checks.count(name, getattr(self, name))
    for name in ('seconds', 'body_seconds'):
      if checks.number(name, getattr(self, name), 0) == 0:
        raise UserError(f'{name}=0 leaves no time; choose a larger number')


@dataclasses.dataclass(frozen=True)
class Offer:
  """What a served model can do, by which requests are checked.

  Attributes:
    model: its name.
    size: height and width of its pictures, in pixels.
    upscaled: those of its enlarged pictures; None if it has no super-resolution.
    ranked: whether it has a ranker.
  """

  model: str
  size: int
  upscaled: int | None
  ranked: bool


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
  """

  prompt: str
  num_images: int = 1
  seed: int = 0
  rank: bool = False
  upscale: bool = False
  previews: int | None = 0
  stream: bool = False
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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


def checked(fields: Mapping[str, Any], offer: Offer, limits: Limits) -> ImageRequest:
  """Checks the fields of a request.

  Args:
    fields: the fields, as in its JSON.
    offer: what the model can do.
    limits: what a client may ask for.

  Raises:
    RequestError: if anything is wrong with them; the message names the field.
  """
  unknown = sorted(fields.keys() - set(_FIELDS))
  if unknown:
    name = checks.shown_as_json(unknown[0])
    raise RequestError(
      f'unknown field {name}; the fields are {", ".join(sorted(_FIELDS))}', field=unknown[0][:80]
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
  prompt = _checked('prompt', checks.text, fields['prompt'])
  if len(prompt) > limits.prompt:
    raise RequestError(
      f'prompt has {len(prompt):,} characters; at most {limits.prompt:,} are allowed',
      field='prompt',
    )
  try:
    checks.texts('prompt', prompt)
  except UserError as error:
    raise RequestError(str(error), field='prompt') from None
  if not prompt.strip():
    raise RequestError('prompt is empty; say what the picture should show', field='prompt')
  return prompt


def _upscale(size: Any, offer: Offer) -> bool:
  """Returns whether pictures of this size are enlarged ones."""
  sizes = {'auto': False, f'{offer.size}x{offer.size}': False}
  if offer.upscaled is not None:
    sizes[f'{offer.upscaled}x{offer.upscaled}'] = True
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
