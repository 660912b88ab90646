"""The sentence of docs/t5x.md on what the tests of t5x were run with."""

SENTENCE = (
  'Tested with t5x cc342d419ec3, airio 69897df7d9a4 and jestimator 326824a477fe, Python 3.11, '
  'jax 0.10.2, flax 0.12.8, optax 0.2.8, orbax-checkpoint 0.12.8, clu 0.0.12, grain 0.2.18, '
  'seqio 0.0.20 and TensorFlow 2.21.0.'
)
