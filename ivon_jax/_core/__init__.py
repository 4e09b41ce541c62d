"""The optimizer and its posterior.

In the order in which data flows: `rule` (the arithmetic of one leaf), `optimizer` (`ivon`),
`priors`, `windows` and `state` (what it reads and keeps), `sampling` and `noise` (drawing from the
posterior), `auto_sampling` and `estimators` (training), `posteriors` (what a state stands for).
`trees`, `axes`, `checks` and `compiler` serve all of them.
"""
