"""Parti's models and tasks for t5x (google-research/t5x) and its commands.

The gin files in `gin_configs/t5x/` configure `t5x.train`, `t5x.eval` and `t5x.infer`. Only this
package imports t5x, and only the table of commands imports this package.
"""
