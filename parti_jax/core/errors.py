"""The error that a user can fix."""


class UserError(Exception):
  """Bad input: a prompt, flag, gin name, file or mesh that can't be used.

  The message is one line that names the file, key or flag at fault and the fix.
  The command line prints it and exits with status 2; library users can catch it.
  """
