"""A checkpoint of one mesh resumes with the same losses on any other, for every objective.

Takes some minutes: launch/test.sh -m slow tests/soak
"""

import shutil

import jax
import pytest
import tiny_runs

from parti_jax.cli import main
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import reporting

DATA = ['make_mesh.data = 8']
OTHERS = {
  'fsdp and tensor': ['make_mesh.fsdp = 4', 'make_mesh.tensor = 2'],
  'one device': [],
  'pipeline': ['make_mesh.stage = 2', 'make_mesh.data = 2', 'make_mesh.tensor = 2'],
}
# For a pipeline: layers enough, and none of whose outputs are needed before the last.
FOR_PIPELINE = {
  'tokenizer': ['ViTVQGANConfig.encoder_layers = 2', 'ViTVQGANConfig.decoder_layers = 2'],
  'generator': ['GeneratorObjective.depth_loss_weights = None'],
}
WITHOUT_LAYERS = ('super_resolution',)


@pytest.fixture(name='train')
def _train(monkeypatch):
  """Trains by the command line in this process; returns the losses by step."""

  def train(arguments):
    losses = {}
    monkeypatch.setattr(
      reporting.Reporter,
      'metrics',
      lambda _, step, values: losses.update({step: values['loss']} if 'loss' in values else {}),
    )
    assert main.main(arguments) == 0
    return losses

  return train


def _take_one_device(patch):
  """Makes meshes of the first device alone."""
  make = mesh_lib.make_mesh
  patch.setattr(mesh_lib, 'make_mesh', lambda: make(devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize('objective', tiny_runs.OBJECTIVES)
def test_a_checkpoint_goes_on_on_other_meshes(tmp_path, train, monkeypatch, objective):
  """Two steps on 8 × data; two more there, on fsdp 4 × tensor 2, on a pipeline, on one device."""
  tiny_runs.write_pictures(tmp_path / 'pictures', 32)
  tiny_runs.write_tokens(tmp_path / 'tokens')
  if objective in tiny_runs.WITH_TOKENIZER:
    train(tiny_runs.tokenizer_arguments(tmp_path, *FOR_PIPELINE['tokenizer']))

  def losses(name, steps, mesh):
    return train(
      tiny_runs.arguments(
        objective,
        tmp_path,
        tmp_path / name,
        'train.eval_split = None',
        'train.pictures_every = 0',
        f'train.steps = {steps}',
        *FOR_PIPELINE.get(objective, []),
        *mesh,
      )
    )

  first = losses('data', 2, DATA)
  for name in OTHERS:
    shutil.copytree(tmp_path / 'data', tmp_path / name)
  expected = losses('data', 4, DATA)
  assert sorted(first) == [1, 2] and sorted(expected) == [3, 4]
  for name, mesh in OTHERS.items():
    if name == 'pipeline' and objective in WITHOUT_LAYERS:
      continue
    with monkeypatch.context() as patch:
      if name == 'one device':
        _take_one_device(patch)
      found = losses(name, 4, mesh)
    assert found == pytest.approx(expected, rel=1e-5), name
