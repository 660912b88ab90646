"""Trains an imported generator further through the commands, and exports it."""

import jax
import numpy as np

from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.data import token_cache
from parti_jax.exported_model import model_folder


def train_and_export(model, captions, codes, folder):
  """Trains for three steps on random tokens, exports to `folder`/exported and draws from that.

  Args:
    model: the model folder.
    captions: captions of the examples.
    codes: number of codes of the image tokenizer.
    folder: an empty folder.

  Returns:
    A tree of the largest change of each parameter of the generator, and the path of a picture that the
    exported model drew for the first caption.
  """
  found = model_folder.load(model)
  length = found.generator_config.image_length
  draw = np.random.default_rng(0)
  examples = [(caption, draw.integers(0, codes, length)) for caption in captions]
  info = {
    'codebook_size': codes,
    'image_tokens': length,
    'tokenizer': found.made_with['tokenizer']['tokenizer'],
  }
  token_cache.write_token_cache(str(folder / 'tokens'), examples, info)
  command = [
    'train',
    '--gin_file=runs/tiny_generator.gin',
    '--gin_file=models/imported_generator.gin',
    f"--gin.MODEL='{model}'",
    f"--gin.token_cache.path='{folder / 'tokens'}'",
    "--gin.imported_generator.dtype='float32'",
    '--gin.train.batch_size=8',
    '--gin.train.steps=3',
    '--gin.parti_schedule.warmup_steps=1',
    '--gin.train.log_every=1',
    f'--model_dir={folder / "run"}',
  ]
  assert main.main(command) == 0
  path = run_checkpoints.latest_checkpoint(str(folder / 'run'))
  assert run_checkpoints.read_config(path, 'generator') == found.generator_config
  out = folder / 'exported'
  command = ['export', f'--base={model}', f'--generator={folder / "run"}', f'--output_dir={out}']
  assert main.main([*command, '--dtype=float32']) == 0
  new = model_folder.load(out)
  moved = lambda one, two: np.abs(np.asarray(one) - np.asarray(two)).max()
  changes = jax.tree.map(moved, new.generator_params, found.generator_params)
  command = ['generate', captions[0], f'--model={out}', f'--output_dir={folder / "drawn"}']
  assert main.main([*command, '--num_images=1']) == 0
  (picture,) = (folder / 'drawn').glob('*seed0_0.png')
  return changes, picture
