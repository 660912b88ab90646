"""The error of a picture that can't be decoded."""

from parti_jax.data import damage


class UndecodablePicture(damage.Unusable):
  """The bytes are not a picture that can be used; the message is the reason in a few words."""
