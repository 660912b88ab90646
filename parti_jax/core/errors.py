"""The error that a person can mend."""


class UserError(Exception):
  """Bad input: a prompt, flag, gin name, file or mesh that can't be used.

  The message is one line that names the file, key or flag at fault and the way out.
  The command line prints it and exits with status 2; a library user catches it.
  """
