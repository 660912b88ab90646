"""The error of a picture that can't be decoded."""

from parti_jax.data import damage


class UndecodablePicture(damage.Unusable):
  """The bytes are not a usable picture; the message is a short reason."""
