"""The settings that are compared, six of each optimizer, and the best of them.

A search by hand on the tuning part of Tiny Shakespeare (one seed, 300 to 500 steps) led to these
grids: three settings of AdamW (best: a rate of 6e-3), eleven of IVON, two of IVON with the squared
gradient ("gradsq"). Of the eleven, which vary rate, b1, b2, clip_radius, and ess and hess_init in
one, none beat the recipe for GPT-2 at a rate of 1000. A likely reason, not measured: the relative
error of its own estimate of the curvature is about sqrt(ess / characters seen), and a run sees 1.5
million characters. With the squared gradient results differ much between seeds: after 300 steps at
a rate of 30, 2.35 with one and 2.53 with another, where the recipe has 2.39 with both.
"""

from benchmarks.evidence.language.training import AdamW, Ivon, Settings

METHODS = ("AdamW", "IVON")


def _gradsq(learning_rate: float, clip_radius: float) -> Ivon:
    return Ivon(learning_rate, hess_init=1e-4, clip_radius=clip_radius, b2=0.99, hess="gradsq")


GRIDS: dict[str, list[Settings]] = {
    "AdamW": [
        AdamW(3e-3),
        AdamW(6e-3),
        AdamW(1e-2),
        AdamW(6e-3, b2=0.95),
        AdamW(6e-3, b2=0.999),
        AdamW(6e-3, weight_decay=0.01),
    ],
    "IVON": [
        Ivon(1000.0),
        Ivon(300.0, b2=0.999, clip_radius=1e-2),
        _gradsq(15.0, 1.0),
        _gradsq(30.0, 1.0),
        _gradsq(60.0, 1.0),
        _gradsq(30.0, 0.3),
    ],
}

CHOSEN: dict[str, Settings] = {"AdamW": AdamW(6e-3, weight_decay=0.01), "IVON": Ivon(1000.0)}
