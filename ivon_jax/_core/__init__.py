"""The optimizer and its posterior.

`rule` is the arithmetic of one leaf, `optimizer` puts it together as `ivon`, which reads `state`,
`priors` (with `masks`), `windows` and `basis` (with `eigenbasis`). `noise` and `sampling` draw from
the posterior, `auto_sampling` and `estimators` train with the draws, and `tampering` notices what
else changes the parameters. `gaussians` and `posteriors` are what a state stands for. `trees`,
which lines gradients and noise up with the leaves that IVON owns, `axes`, `checks` and `compiler`
serve all of them.
"""
