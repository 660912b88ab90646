"""Samples in the forms that evaluators of class-conditional models read: one .npz, or PNG files.

ADM's evaluator (Dhariwal and Nichol 2021, arXiv 2105.05233) reads `arr_0`, uint8 [samples, height, width,
3], from an uncompressed .npz; its own sampler adds the classes as `arr_1`. DiT's and LlamaGen's samplers
write 000000.png and so on first.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int64
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core.errors import UserError

# Zip files have a date for each member; a fixed one makes equal samples equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


def npz_bytes(samples: int, size: int) -> int:
  """Returns about how many bytes an .npz of samples takes."""
  return samples * (3 * size**2 + 8) + 2**10


def check_space(folder: pathlib.Path, needed: int) -> None:
  """Raises UserError if a disk has less space than some bytes."""
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise UserError(
      f'--output_dir {folder}: the samples take {needed / 1e9:.1f} GB, but the disk has '
      f'{free / 1e9:.1f} GB; choose another folder, or fewer samples'
    )


def write_npz(
  path: pathlib.Path,
  batches: Iterable[UInt8[np.ndarray, 'batch size size 3']],
  labels: Int64[np.ndarray, 'samples'],
  size: int,
) -> str:
  """Writes samples to an .npz, of which only a batch is in memory at a time.

  Args:
    path: path of the file, which is replaced once the new one is complete.
    batches: the samples in order.
    labels: the class of each sample.
    size: height and width of the samples.

  Returns:
    The SHA-256 digest of the samples' bytes, which doesn't depend on the form of the file.

  Raises:
    UserError: the file can't be written.
    ValueError: the batches have another number of samples than `labels`, or another size.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  digest, count = hashlib.sha256(), 0
  try:
    with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
      with archive.open(zipfile.ZipInfo('arr_0.npy', _DATE), 'w', force_zip64=True) as file:
        shape = (len(labels), size, size, 3)
        np.lib.format.write_array_header_1_0(
          file, {'descr': '|u1', 'fortran_order': False, 'shape': shape}
        )
        for batch in batches:
          if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
            raise ValueError(f'samples are {batch.dtype} {list(batch.shape)}, expected {shape}')
          data = np.ascontiguousarray(batch).tobytes()
          file.write(data)
          digest.update(data)
          count += len(batch)
      with archive.open(zipfile.ZipInfo('arr_1.npy', _DATE), 'w') as file:
        np.lib.format.write_array(file, labels.astype('<i8'), allow_pickle=False)
    if count != len(labels):
      raise ValueError(f'{count} samples of {len(labels)} classes')
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f'{path} cannot be written ({error.strerror or error})') from error
  finally:
    temporary.unlink(missing_ok=True)
  return digest.hexdigest()


def write_pngs(
  folder: pathlib.Path, batches: Iterable[UInt8[np.ndarray, 'batch size size 3']]
) -> int:
  """Writes samples as 000000.png and so on; files that exist are kept.

  Args:
    folder: the folder, which has only these samples.
    batches: the samples in order.

  Returns:
    The number of samples.

  Raises:
    UserError: a file can't be written.
  """
  count = 0
  temporary = folder.with_name(f'.{folder.name}.{os.getpid()}')
  try:
    folder.mkdir(exist_ok=True)
    for batch in batches:
      for image in batch:
        path = folder / f'{count:06d}.png'
        if not path.exists():
          Image.fromarray(image).save(temporary, 'PNG')
          os.replace(temporary, path)
        count += 1
  except OSError as error:
    raise UserError(f'{folder} cannot be written ({error.strerror or error})') from error
  finally:
    temporary.unlink(missing_ok=True)
  return count
