"""The settings that are compared, six of each optimizer, and the best of them.

A search by hand on the tuning part of Tiny Shakespeare, in runs of 300 to 500 steps, led to these
grids. AdamW is best near a rate of 6e-3. For IVON the recipe for GPT-2 was varied in rate, b1, b2,
ess, hess_init and clip_radius without gain: the relative error of its own estimate of the curvature
is about sqrt(ess / characters seen), and a run sees 1.5 million characters, so that h stays near
hess_init or follows the noise. With the squared gradient instead ("gradsq") h is learned in some
hundred steps, but such runs differ much between seeds: after 300 steps at a rate of 30, 2.35 with
one and 2.53 with another, where the recipe has 2.39 with both.
"""

from language_training import AdamW, Ivon, Settings

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
