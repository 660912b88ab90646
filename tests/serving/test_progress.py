"""Following a request: more and more rows, then the pictures of `generate`."""

import numpy as np
import pytest

from parti_jax.sampling import slots
from parti_jax.serving import image_requests
from parti_jax.serving import progress


def test_rows_appear_until_the_pictures_are_there(service_of, served_model):
  service = service_of()
  request = image_requests.ImageRequest(
    'red apple', 2, 5, rank=True, upscale=True, previews=None, sampling={'temperature': 0.9}
  )
  *states, last = progress.follow(service, request)
  assert states[0].share == 0 and list(states[0].images) == [None, None]
  shares = [state.share for state in states]
  assert shares == sorted(shares) and states[-1].share <= last.share == 1
  for state in states:
    for image in state.images:
      assert image is None or (image[-4:] == slots.BLANK).all()
  assert all(image is not None for image in last.images)
  wanted = served_model.generate('red apple', 2, 5, rank=True, upscale=True, temperature=0.9)
  np.testing.assert_array_equal(last.result.tokens, wanted.tokens)
  np.testing.assert_array_equal(last.result.image_index, wanted.image_index)
  assert np.abs(last.result.upscaled.astype(int) - wanted.upscaled).max() <= 1
  assert service.pending == 0


def test_whoever_stops_following_withdraws_the_request(service_of, gate):
  service = service_of()
  gate.clear()
  states = progress.follow(service, image_requests.ImageRequest('red apple', 4, previews=None))
  assert next(states).result is None and next(states).result is None
  assert service.pending == 4
  states.close()
  assert service.pending == 0


def test_refusals_and_the_end_reach_the_follower(service_of, gate):
  service = service_of(queue=4)
  with pytest.raises(image_requests.RequestError, match='guidance_ramp'):
    list(
      progress.follow(service, image_requests.ImageRequest('a', sampling={'guidance_ramp': '?'}))
    )
  gate.clear()
  with pytest.raises(image_requests.RequestError, match='at most 8'):
    list(progress.follow(service, image_requests.ImageRequest('a', 9)))
  states = progress.follow(service, image_requests.ImageRequest('a', 2))
  next(states)
  service.sampler.close(wait=False, cancel_waiting=True)
  with pytest.raises(image_requests.RequestError, match='the server stopped'):
    list(states)
  with pytest.raises(image_requests.RequestError, match='the server is stopping'):
    list(progress.follow(service, image_requests.ImageRequest('a')))
  assert service.pending == 0
