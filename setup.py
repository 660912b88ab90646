"""Names the packages; everything else is in setup.cfg.

setup.cfg's `find:` can't add `gin_configs`, which lies at the top of the repository and is
installed inside the package.
"""

import setuptools

setuptools.setup(
  packages=[
    *setuptools.find_packages(include=['parti_jax', 'parti_jax.*']),
    'parti_jax.gin_configs',
  ],
  package_dir={'parti_jax.gin_configs': 'gin_configs'},
)
