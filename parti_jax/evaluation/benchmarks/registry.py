"""The benchmarks by their names on the command line."""

from __future__ import annotations

from parti_jax.evaluation.benchmarks import base
from parti_jax.evaluation.benchmarks import dpg
from parti_jax.evaluation.benchmarks import geneval
from parti_jax.evaluation.benchmarks import hps
from parti_jax.evaluation.benchmarks import t2i_compbench

BENCHMARKS: dict[str, base.Benchmark] = {
  'geneval': geneval.GenEval(),
  'dpg': dpg.DPG(),
  't2i_compbench': t2i_compbench.T2ICompBench(),
  'hps': hps.HPS(),
}
