"""Why IVON's setting of one text fails on another: its longest step is too long.

    python benchmarks/evidence/language/plateau.py --text movie_reviews.txt.xz

The setting that Shakespeare has chosen is run as it is and with half its longest step. Its loss may
stay near that of counted pairs of characters, for which a network needs no attention: beside the
losses stands how large the gradient of the first attention's output is after an eighth of the run.
A run takes four minutes on one core.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._shared.journal import parse
from benchmarks.evidence.language.main import CURVE_WINDOWS
from benchmarks.evidence.language.text import Text, fixed_windows, read_text
from benchmarks.evidence.language.training import Ivon, Settings, train
from examples._shared.reporting import format_table

CHOSEN = Ivon(4e-3, ess=1e10, hess_init=0.1, clip_radius=1e-3, turnover=2.0)
POINTS = 8  # of a run


@dataclass
class Options:
    """The command line."""

    text: Path
    """A text file, read as bytes; it may be compressed (.xz)."""
    steps: int = 2000
    seeds: int = 2


def loss_of_pairs(text: Text) -> float:
    """The validation loss of the frequencies with which characters follow each other."""
    counts = np.full((text.vocabulary, text.vocabulary), 0.1)
    np.add.at(counts, (text.train[:-1], text.train[1:]), 1)
    log_probs = np.log(counts / counts.sum(axis=1, keepdims=True))
    return -float(log_probs[text.validation[:-1], text.validation[1:]].mean())


def path_of(settings: Settings, text: Text, steps: int, seed: int) -> tuple[list[float], float]:
    """Validation losses on the way, and the rms of the first attention's gradient at the first."""
    windows = fixed_windows(text.validation, CURVE_WINDOWS)
    value_and_grad = jax.jit(jax.value_and_grad(text.network.loss))
    found = []
    for _, state in train(settings, text.network, text.train, steps, seed, POINTS):
        loss, grads = value_and_grad(state.params, windows)
        output = grads["layers"][0]["out"]["kernel"]
        found.append((float(loss), float(optax.tree.norm(output) / jnp.sqrt(output.size))))
    return [loss for loss, _ in found], found[0][1]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    options = parse(Options, __doc__, argv)
    text, steps = read_text(options.text), options.steps
    places = [steps * (k + 1) // POINTS for k in (0, 1, 3, 7)]
    rows: list[Sequence[str]] = [
        ["longest step", "seed", *(f"loss after {at:,}" for at in places), "gradient"]
    ]
    for longest in (CHOSEN.longest, CHOSEN.longest / 2):
        for seed in range(options.seeds):
            losses, size = path_of(replace(CHOSEN, longest=longest), text, steps, seed)
            shown = (f"{losses[k]:.3f}" for k in (0, 1, 3, 7))
            rows.append([f"{longest:g}", str(seed), *shown, f"{size:.1e}"])
    print(f"Pairs of characters: {loss_of_pairs(text):.3f}\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
