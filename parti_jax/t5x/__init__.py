"""Parti as a model and its data as tasks of t5x (google-research/t5x), for its own commands.

`t5x.train`, `t5x.eval` and `t5x.infer` find everything by gin files of `gin_configs/t5x/`. This
package is the only one that imports t5x, and nothing but the table of commands names it.
"""
