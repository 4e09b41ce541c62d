"""The optimizer and its posterior.

In the order in which data flows: `rule` (the arithmetic of one leaf), `optimizer` (`ivon`),
`priors` (weight decay, masks, general priors), `windows` and `state` (what it reads and keeps),
`sampling` and `noise` (drawing from the posterior), `auto_sampling` and `estimators` (training),
`posteriors` (what a state stands for). `trees` (lines gradients and noise up with the leaves that
IVON owns, and refuses what does not fit), `axes`, `checks` (of single arguments) and `compiler`
serve all of them.
"""
