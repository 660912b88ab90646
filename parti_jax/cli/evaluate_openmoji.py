"""`parti-jax evaluate` on OpenMoji, and on scenes made of it."""

from __future__ import annotations

import argparse

from parti_jax.cli import evaluate_shared
from parti_jax.cli import sampling_flags
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.evaluation import output_folder
from parti_jax.evaluation.openmoji import contact_sheet
from parti_jax.evaluation.openmoji import openmoji_report
from parti_jax.evaluation.openmoji import scene_evaluation


def run(args: argparse.Namespace, shared: evaluate_shared.Shared):
  """Evaluates on OpenMoji; returns the report, its contact sheets by name, and their folder."""
  folder = output_folder.make(args.output_dir)
  pages = {}

  def on_sample(sample):
    pages[sample.split] = contact_sheet.contact_sheet(sample)

  report = openmoji_report.evaluate(
    shared.model,
    args.splits,
    args.num_images,
    args.max_prompts,
    args.seed,
    train_prompts=args.train_prompts,
    judge=shared.judge,
    on_sample=on_sample,
    progress=True,
    extractors=shared.extractors,
    batch_size=args.batch_size,
    rank=args.rank,
    **sampling_flags.given(args),
  )
  return report, pages, folder


def run_scenes(args: argparse.Namespace, shared: evaluate_shared.Shared):
  """Evaluates on scenes made of OpenMoji; returns the same values as `run`."""
  folder = output_folder.make(args.output_dir)
  settings = openmoji_scenes.Settings(of_seen_names=args.of_seen_names)
  sampling = sampling_flags.overriding(args)
  output_folder.claim(
    folder,
    {
      'dataset': args.dataset,
      'seed': args.seed,
      'num_images': args.num_images,
      'max_prompts': args.max_prompts,
      'train_prompts': args.train_prompts,
      'sampling': sampling,
      'scenes': openmoji_grammar.digest(settings)[:16],
      'model': output_folder.model_fingerprint(args.model),
    },
  )
  report, samples = scene_evaluation.evaluate(
    shared.model,
    folder,
    args.splits,
    args.num_images,
    args.max_prompts,
    args.seed,
    train_prompts=args.train_prompts,
    settings=settings,
    rank=args.rank,
    progress=True,
    batch_size=args.batch_size,
    **sampling,
  )
  pages = {sample.split: scene_evaluation.contact_sheet(sample) for sample in samples}
  return report, pages, folder
