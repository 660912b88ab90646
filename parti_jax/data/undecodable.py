"""The error of a picture that can't be decoded."""


class UndecodablePicture(Exception):
  """The bytes are not a picture that can be used; the message is the reason in a few words."""
