"""`python -m parti_jax.train ...` is `parti-jax train ...`."""

import sys

from parti_jax.cli import main

if __name__ == '__main__':
  sys.exit(main.main(['train', *sys.argv[1:]]))
