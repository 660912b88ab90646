"""Parti, autoregressive text-to-image generation (arXiv 2206.10789), in JAX and Flax.

Each public name is imported when it is first used, so that `import parti_jax` loads neither JAX nor
TensorFlow and the command line starts quickly.
"""

import importlib

__version__ = '0.1.0'

# Public name -> the module that defines it.
_MODULES = {
  # Sampling.
  'load': 'parti_jax.sampling.text_to_image',
  'TextToImage': 'parti_jax.sampling.text_to_image',
  'Result': 'parti_jax.sampling.results',
  'ContinuousSampler': 'parti_jax.sampling.continuous',
  'SamplingSettings': 'parti_jax.exported_model.sampling_settings',
  # Networks.
  'Parti': 'parti_jax.models.parti',
  'PartiConfig': 'parti_jax.models.parti_config',
  'ViTVQGAN': 'parti_jax.models.vit_vqgan',
  'ViTVQGANConfig': 'parti_jax.models.vit_vqgan',
  'CoCa': 'parti_jax.models.coca',
  'CoCaConfig': 'parti_jax.models.coca',
  'SuperResolution': 'parti_jax.models.super_resolution',
  'SuperResolutionConfig': 'parti_jax.models.super_resolution',
  'Discriminator': 'parti_jax.models.discriminator',
  'DiscriminatorConfig': 'parti_jax.models.discriminator',
  # Training.
  'Objective': 'parti_jax.training.objectives.base',
  'GeneratorObjective': 'parti_jax.training.objectives.generator_objective',
  'TokenizerObjective': 'parti_jax.training.objectives.tokenizer_objective',
  'RankerObjective': 'parti_jax.training.objectives.ranker_objective',
  'SuperResolutionObjective': 'parti_jax.training.objectives.super_resolution_objective',
  'TextEncoderObjective': 'parti_jax.training.objectives.text_encoder_objective',
  'LoraObjective': 'parti_jax.training.objectives.lora_objective',
  'Trainer': 'parti_jax.training.trainer',
  'TrainState': 'parti_jax.training.state',
  'adafactor': 'parti_jax.training.optimizers',
  'adamw': 'parti_jax.training.optimizers',
  'muon': 'parti_jax.training.optimizers',
  'parti_schedule': 'parti_jax.training.optimizers',
  'warmup_cosine': 'parti_jax.training.optimizers',
  'make_mesh': 'parti_jax.partitioning.mesh',
  # Data.
  'Batches': 'parti_jax.data.batches',
  'TextVocabulary': 'parti_jax.data.vocabulary',
  # Errors.
  'UserError': 'parti_jax.core.errors',
}

__all__ = list(_MODULES)


def __getattr__(name):
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(_MODULES[name]), name)
  globals()[name] = value
  return value


def __dir__():
  return sorted({*globals(), *__all__})
