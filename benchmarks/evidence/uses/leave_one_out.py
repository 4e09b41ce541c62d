"""Early stopping and a choice of prior without held-out data, by the leave-one-out NLL.

Run `python examples/leave_one_out.py` (about a minute and a half on two cores).

`leave_one_out` estimates, from the training set alone, the loss that each training example would
have under a model trained without it. Here a network with 16 units in each of two hidden layers
learns 500 of scikit-learn's digits, with λ = N; each seed draws other images, weights and noise.

1. It is trained too long, at a constant rate with next to no weight decay. Which epoch should be
   kept? Once with the labels as they are, and once with a fifth of them wrong, in the training
   and the test set alike, so that there is more to overfit.
2. It is trained by a cosine schedule under several priors (labels as in the second case). Which
   prior should be taken?

Each criterion sees a curve of its own, and its choice is scored on the test set. Besides the
estimate to first and to second order these are: the training NLL; a validation split (one fifth
of the images is held out, and the network learns from the rest, or again from all of them once
the choice is made); and as many further labelled images as there are to train on, which the other
criteria must do without.

Hyperparameters: for 1, constant rates of 0.05 to 0.3 were looked at on a few seeds, to find a
network that overfits within 200 epochs while its mean does not jump about: the estimate jumps with
it, and the smallest of many noisy values is a bad choice. At rate 0.2 with clean labels (5 seeds)
the leave-one-out choice cost 0.12 ± 0.04, no less than that of the training NLL, 0.11 ± 0.04. The
wrong labels came after that. `--temperature 0.1` trains with λ = 10 N.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from benchmarks.evidence.images.image_training import MLP
    from benchmarks.evidence.uses.leave_one_out_report import (
        Curves,
        choices_table,
        format_decay,
        priors_table,
        stopping_table,
        write_figure,
    )
    from benchmarks.evidence.uses.small_digits import (
        Apply,
        Array,
        Digits,
        PyTree,
        Recipe,
        cross_entropy,
        load_digits,
        make_ivon,
        nll,
        run_epochs,
        unweighted,
        wrong_labels,
    )
    from examples._shared.reporting import example_parser, positive
    from ivon_jax import leave_one_out, metrics, posterior, predict_log_probs
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

WIDTH = 16
NUM_TRAIN = 500
NUM_SAMPLES = 32  # for the averaged predictions
WRONG = 0.2  # share of the labels
EVERY = 5  # epochs between two looks
PATIENCE = 8  # looks
STOPPING = Recipe(epochs=200, learning_rate=0.1, cosine=False)
STOPPING_DECAY = 1e-4
PRIORS = Recipe(epochs=60, learning_rate=0.3)
DECAYS = tuple(np.geomspace(1e-4, 1e-1, 7).tolist())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    start = time.perf_counter()
    parser = example_parser("Leave-one-out NLL against test NLL.", "leave_one_out.png", seeds=8)
    add = parser.add_argument
    add("--epochs", type=positive, default=STOPPING.epochs, help="length of the long run")
    add("--prior-epochs", type=positive, default=PRIORS.epochs, help="length under each prior")
    add("--temperature", type=float, default=1.0, help="trains with λ = N / temperature")
    args = parser.parse_args(argv)
    if args.epochs % EVERY or not args.temperature > 0:
        parser.error(f"--epochs must be a multiple of {EVERY}, and --temperature positive")
    stopping = STOPPING._replace(epochs=args.epochs, temperature=args.temperature)
    priors = PRIORS._replace(epochs=args.prior_epochs, temperature=args.temperature)
    announce(stopping, priors, args.seeds)

    digits = load_digits()
    keys = jax.random.split(jax.random.key(0), args.seeds)
    labels = {"labels as they are": 0.0, f"{100 * WRONG:.0f} % of the labels wrong": WRONG}
    with tqdm(total=4 + 2 * len(DECAYS), desc="training", disable=None) as bar:

        def run(recipe: Recipe, every: int, settings: Sequence[Setting]) -> Runs:
            runs = []
            for held_out in (False, True):
                follow = jax.jit(partial(track_seeds, recipe, held_out, every))
                curves = []
                for setting in settings:
                    curves.append(jax.tree.map(np.asarray, follow(digits, keys, setting)))
                    bar.update()
                runs.append(curves)
            return Runs(*runs)

        of_cases = run(
            stopping, EVERY, [Setting(STOPPING_DECAY, wrong) for wrong in labels.values()]
        )
        of_priors = run(priors, priors.epochs, [Setting(decay, WRONG) for decay in DECAYS])
    under_priors = Runs(
        *(Curves(*(np.concatenate(x, axis=1) for x in zip(*run, strict=True))) for run in of_priors)
    )

    for name, full, part in zip(labels, *of_cases, strict=True):
        print(f"\n1. Which epoch to keep: {name}\n")
        print(stopping_table(full, part, EVERY, PATIENCE))
    print(f"\n2. The end of training under each prior, {100 * WRONG:.0f} % of the labels wrong\n")
    print(priors_table(under_priors.full, DECAYS))
    print("\n   and which prior each criterion takes\n")
    print(choices_table(under_priors.full, under_priors.part, DECAYS))
    print(
        f"""
Test NLL is at the posterior mean, and so are the estimates. "Cost" is what the choice loses against
the best of the run on all {NUM_TRAIN} images, seed by seed. "Rank correlation" is Spearman's, of
the criterion with the test NLL of the same run, over epochs or over priors. Second order is
undefined for examples whose removal would leave no proper posterior (they are left out of its mean,
which flatters it), and enormous for those that come close to it."""
    )
    full_curves = dict(zip(labels, of_cases.full, strict=True))
    write_figure(args.output, full_curves, under_priors.full, DECAYS, EVERY, PATIENCE)
    print(f"Wall time {time.perf_counter() - start:.0f} s, compilation included.")
    return 0


class Runs(NamedTuple):
    """Curves of the runs on all images, and of those on four fifths of them.

    Each is a list by setting, or one `Curves` with an axis for it.
    """

    full: Any
    part: Any


def announce(stopping: Recipe, priors: Recipe, seeds: int) -> None:
    """Says what is about to be run."""
    print(
        f"{NUM_TRAIN} digits, perceptron 64-{WIDTH}-{WIDTH}-10, {seeds} seeds, "
        f"λ = N / {stopping.temperature:g}, h₀ = {stopping.hess_init:g}, β₂ = {stopping.b2:g}\n"
        f"1. {stopping.epochs} epochs at rate {stopping.learning_rate:g}, "
        f"δ = {format_decay(STOPPING_DECAY)}; looked at every {EVERY} epochs, "
        f"patience {PATIENCE} looks\n"
        f"2. {priors.epochs} epochs, peak rate {priors.learning_rate:g}, "
        f"δ from {format_decay(DECAYS[0])} to {format_decay(DECAYS[-1])}"
    )


class Setting(NamedTuple):
    """What runs of one compiled function may differ in.

    Attributes:
      decay: δ.
      wrong: share of wrong labels, in the training and the test set.
    """

    decay: Any
    wrong: Any


def track_seeds(
    recipe: Recipe, held_out: bool, every: int, digits: Digits, keys: Array, setting: Setting
) -> Curves:
    """`track` for each seed, one after the other; arrays (seeds, looks)."""
    return jax.lax.map(lambda key: track(recipe, held_out, every, digits, key, setting), keys)


def track(
    recipe: Recipe, held_out: bool, every: int, digits: Digits, key: Array, setting: Setting
) -> Curves:
    """Trains from one seed and measures every so many epochs.

    Args:
      recipe: how to train.
      held_out: whether a fifth of the images is held out for validation. Otherwise all are
        learned, and as many further ones play that part.
      every: number of epochs between two looks.
      digits: all images; which ones are learned is drawn by the key.
      key: seed of images, labels, weights, batches and noise.
      setting: δ and the share of wrong labels.
    """
    keys = jax.random.split(key, 6)
    rows = jax.random.permutation(keys[0], len(digits.labels))
    labels = wrong_labels(keys[1], digits.labels, setting.wrong)
    test = digits.test_images, wrong_labels(keys[2], digits.test_labels, setting.wrong)
    cut, end = (NUM_TRAIN * 4 // 5, NUM_TRAIN) if held_out else (NUM_TRAIN, 2 * NUM_TRAIN)
    train = digits.images[rows[:cut]], labels[rows[:cut]]
    valid = digits.images[rows[cut:end]], labels[rows[cut:end]]

    apply: Apply = MLP(WIDTH).apply
    recipe = recipe._replace(weight_decay=setting.decay)
    state = make_ivon(recipe, cut).init(MLP(WIDTH).init(keys[3], train[0][:1]))

    def look(state: PyTree, epoch_keys: Array) -> tuple[PyTree, Curves]:
        state = run_epochs(apply, recipe, unweighted(*train), state, epoch_keys)
        # Whatever λ was in training, V must be that of plain Bayes, λ = N.
        q = posterior(state, temperature=1 / recipe.temperature)
        averaged = predict_log_probs(apply, NUM_SAMPLES)(keys[5], state, test[0])
        curves = Curves(
            train=nll(apply, q.mean, *train),
            valid=nll(apply, q.mean, *valid),
            test=nll(apply, q.mean, *test),
            averaged=metrics.nll(averaged, test[1]),
            **({} if held_out else estimates(apply, q, *train)),
        )
        return state, curves

    epoch_keys = jax.random.split(keys[4], recipe.epochs).reshape(-1, every)
    return jax.lax.scan(look, state, epoch_keys)[1]


def estimates(apply: Apply, q: PyTree, images: Array, labels: Array) -> dict[str, Array]:
    """Leave-one-out NLL to first and second order, and the share where the latter is undefined."""
    losses = {
        order: leave_one_out(apply, cross_entropy, second_order=order)(
            q, images, targets=labels
        ).loss
        for order in (False, True)
    }
    return {
        "first": losses[False].mean(),
        "second": jnp.nanmean(losses[True]),
        "undefined": jnp.isnan(losses[True]).mean(),
    }


if __name__ == "__main__":
    sys.exit(main())
