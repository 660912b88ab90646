"""Fetches files of a repository of the Hugging Face Hub, and compares them with its digests.

    python launch/fetch_from_hub.py OWNER/NAME FOLDER FILE...

Files that FOLDER has already are fetched again only if they have changed. The Hub publishes the SHA-256
of large files.
"""

import hashlib
import sys

import huggingface_hub


def _fail(message: str):
  sys.exit(f'fetch_from_hub.py: error: {message}')


def _sha256(path: str) -> str:
  with open(path, 'rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


def main(repository: str, folder: str, *files: str):
  try:
    published = huggingface_hub.HfApi().get_paths_info(repository, list(files))
    digests = {found.path: found.lfs.sha256 for found in published if found.lfs}
    if missing := sorted(set(files) - {found.path for found in published}):
      _fail(f'{repository} has no {", ".join(missing)}')
    for file in files:
      path = huggingface_hub.hf_hub_download(repository, file, local_dir=folder)
      if file in digests and _sha256(path) != digests[file]:
        _fail(
          f"{path} doesn't have the SHA-256 that {repository} publishes; remove it and try again"
        )
  except Exception as error:  # noqa: BLE001  # The library has many kinds, of its own and of others.
    reason = ' '.join(str(error).split()) or type(error).__name__
    _fail(
      f'{repository} cannot be fetched; is there a connection to huggingface.co? {reason[:200]}'
    )


if __name__ == '__main__':
  main(*sys.argv[1:])
