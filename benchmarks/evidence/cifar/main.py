"""CIFAR-10 with ResNet-20: SGD, AdamW, SAM, MC-dropout, SWAG, ensembles, and IVON.

    python benchmarks/evidence/cifar/main.py --data DIR                      # 5,000 images
    python benchmarks/evidence/cifar/main.py --data DIR --preset reference   # for a GPU
    python benchmarks/evidence/cifar/main.py --report                        # tables and figure

DIR holds `cifar-10-batches-py`. ResNet-20 with filter response normalisation is trained on random
crops and mirror images. Every method tries the six settings of its grid, `laptop` for ten of its 30
epochs, takes that with the lowest NLL on other training images, and is tested once with each seed;
the ensemble and the mixture average the probabilities of all seeds' runs. `paper` has the settings
of the paper and tries none. A run of 30 epochs takes 20 minutes on one core. Runs go on after the
last epoch that was finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks._shared.comparing import (
    average_of_files,
    averaged,
    best_of,
    chosen_by,
    setting_rows,
    shown,
    way_rows,
)
from benchmarks._shared.journal import (
    Evidence,
    Journal,
    Runs,
    command,
    current,
    file_of,
    grouped,
    write_tables,
)
from benchmarks._shared.methods import auroc, seed_keys
from benchmarks._shared.tuning import Grid, settings
from benchmarks.evidence.cifar import methods
from benchmarks.evidence.cifar.data import (
    Images,
    floats,
    load_cifar10,
    load_unfamiliar,
    with_noise,
)
from benchmarks.evidence.cifar.methods import METHODS, Run
from examples._shared.datasets import DataError
from examples._shared.reporting import save_figure
from examples._shared.unfamiliar import draw_entropies
from ivon_jax import metrics


class Preset(NamedTuple):
    """Sizes of an experiment."""

    num_train: int
    num_valid: int  # further training images, which choose the settings
    num_test: int
    epochs: int
    epochs_to_choose: int  # of the runs that choose the settings
    batch_size: int
    samples: int


PRESETS = {
    "laptop": Preset(5_000, 2_000, 5_000, 30, 10, 50, 16),
    "reference": Preset(40_960, 9_040, 10_000, 312, 312, 256, 512),  # 49,920 steps
    "paper": Preset(50_000, 0, 10_000, 200, 0, 50, 512),
}
# Six settings each (of SGD and AdamW, lower rates were tried before). IVON's `sharpness` is ess/N.
GRIDS: dict[str, Grid] = {
    "sgd": {"learning_rate": (0.1, 0.3, 1.0), "weight_decay": (5e-4, 3e-3)},
    "adamw": {"learning_rate": (1e-2, 3e-2, 1e-1), "weight_decay": (0.03, 0.3)},
    "sam": {"learning_rate": (0.03, 0.1, 0.3), "rho": (0.05, 0.15), "weight_decay": (1e-3,)},
    "dropout": {"learning_rate": (0.03, 0.1, 0.3), "rate": (0.02, 0.1), "weight_decay": (1e-3,)},
    "swag": {
        "learning_rate": (0.03, 0.1, 0.3),
        "swag_rate": (0.02, 0.05),
        "weight_decay": (1e-3,),
    },
    "ivon": {
        "learning_rate": (0.1, 0.3, 1.0),
        "sharpness": (2.0, 10.0),
        "hess_init": (1.0,),
        "weight_decay": (1e-3,),
    },
}
# Of the paper, for 200 epochs: no search.
PAPER: dict[str, Grid] = {
    "sgd": {"learning_rate": (0.2,), "weight_decay": (2e-4,)},
    "adamw": {"learning_rate": (2e-3,), "weight_decay": (0.1,)},
    "ivon": {
        "learning_rate": (0.2,),
        "sharpness": (1.0,),
        "hess_init": (0.5,),
        "weight_decay": (2e-4,),
    },
}
WAYS = {
    ("sgd", "point"): "SGD",
    ("sgd", "together"): "SGD, ensemble",
    ("adamw", "point"): "AdamW",
    ("adamw", "together"): "AdamW, ensemble",
    ("sam", "point"): "SAM",
    ("dropout", "samples"): "MC-dropout",
    ("swag", "samples"): "SWAG",
    ("ivon", "point"): "IVON at the mean",
    ("ivon", "samples"): "IVON",
    ("ivon", "together"): "IVON, mixture",
}
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("cifar.jsonl")
    data: Path | None = None
    """Folder of `cifar-10-batches-py`."""
    unfamiliar: Path | None = None
    """An .npz with `images` (n, 32, 32, 3) of other things."""
    mnist: Path | None = None
    """Folder of MNIST's files."""
    preset: Literal["laptop", "reference", "paper"] = "laptop"
    methods: tuple[Literal["sgd", "adamw", "sam", "dropout", "swag", "ivon"], ...] = ()
    """All by default; of `paper`, those that it has."""
    seeds: int = 3
    noise: float = 0.0
    """Share of the training labels that are wrong."""
    longer: int = 1
    """Times the epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < 1 or self.longer < 1 or self.seeds < 1:
            raise SystemExit("--noise is in [0, 1), --longer and --seeds are at least 1")

    @property
    def grids(self) -> dict[str, Grid]:
        """What each method tries."""
        found = PAPER if self.preset == "paper" else GRIDS
        unknown = set(self.methods) - set(found)
        if unknown:
            raise SystemExit(f"the preset {self.preset} has no settings of {', '.join(unknown)}")
        return {name: found[name] for name in self.methods or found}

    @property
    def identity(self) -> dict[str, Any]:
        """What all runs of a command have in common."""
        named = {"Tiny ImageNet": self.unfamiliar, "MNIST": self.mnist}
        others = [name for name, path in named.items() if path is not None]
        sizes = {"preset": self.preset, "noise": self.noise, "longer": self.longer}
        return {**sizes, "others": others}

    @property
    def folder(self) -> Path:
        """Where unfinished runs are, and predictions for ensembles and the figure."""
        found = self.results.with_suffix("")
        found.mkdir(exist_ok=True)
        return found

    def run(self, stage: str, method: str, values: Mapping[str, Any], **more: Any) -> Metrics:
        """What identifies a run."""
        found = {"stage": stage, **self.identity, "method": method, "values": dict(values)}
        return {**found, **more}

    def predictions(self, method: str, seed: int, values: Mapping[str, Any]) -> Path:
        """Log-probabilities of a tested run."""
        return file_of(self.folder, self.run("test", method, values, seed=seed))


class Study:
    """The images of a preset."""

    def __init__(self, options: Options, folder: Path):
        self.options, self.preset = options, PRESETS[options.preset]
        train, test = load_cifar10(folder)
        ends = self.preset.num_train, self.preset.num_train + self.preset.num_valid
        part = lambda x, a, b: floats(Images(x.images[a:b], x.labels[a:b]))  # noqa: E731
        self.train = with_noise(part(train, 0, ends[0]), options.noise)
        self.valid = part(train, *ends)
        self.test = part(test, 0, self.preset.num_test)
        self.others = load_unfamiliar(options.unfamiliar, options.mnist)
        self.predict = methods.Predictor(self.preset.samples)

    def fitted(self, method: str, seed: int, values: Mapping[str, Any], epochs: int) -> Any:
        """What a run ends with."""
        epochs *= self.options.longer
        run = Run(method, epochs, self.preset.batch_size, self.preset.num_train)
        return methods.train(run, values, self.train, seed, self.options.folder)

    def validated(self, method: str, values: Mapping[str, Any]) -> Metrics:
        """Scores of a setting on validation images."""
        fitted = self.fitted(method, 0, values, self.preset.epochs_to_choose)
        predicted = self.predict(fitted, jax.random.key(1), self.valid.images)
        return {way: scores(x, self.valid.labels) for way, x in predicted.items()}

    def tested(self, method: str, seed: int, values: Mapping[str, Any]) -> Metrics:
        """Scores on test images, and the detection of unfamiliar ones."""
        fitted = self.fitted(method, seed, values, self.preset.epochs)
        inputs = {"": self.test.images, **self.others}
        key = seed_keys(seed)[2]
        predicted = {k: self.predict(fitted, key, x) for k, x in inputs.items()}
        kept: Any = {name: averaged(x.get("samples", x["point"])) for name, x in predicted.items()}
        np.savez(self.options.predictions(method, seed, values), **kept)
        ways = predicted[""]
        found = {way: self.scored({k: x[way] for k, x in predicted.items()}) for way in ways}
        if method == "ivon":
            found["curve"] = sample_curve(ways["samples"], self.test.labels)
        return found

    def together(self, method: str, values: Mapping[str, Any]) -> Metrics:
        """Scores of the average of all seeds' probabilities."""
        files = [self.options.predictions(method, k, values) for k in range(self.options.seeds)]
        return {"together": self.scored(average_of_files(files))}

    def scored(self, log_probs: dict[str, np.ndarray]) -> Metrics:
        """Scores on test images, named "", and how well others are told from them."""
        found = scores(log_probs[""], self.test.labels)
        entropy = {
            k: metrics.predictive_entropy(jnp.asarray(averaged(x))) for k, x in log_probs.items()
        }
        for name in self.others:
            found[f"{name}, entropy"] = auroc(entropy[""], entropy[name])
        return found


def scores(log_probs: np.ndarray, labels: np.ndarray) -> Metrics:
    """Metrics of log-probabilities (n, 10), or of the average of (S, n, 10)."""
    x, y = jnp.asarray(averaged(log_probs)), jnp.asarray(labels)
    names = ("accuracy", "nll", "ece", "brier")
    return {name: float(getattr(metrics, name)(x, y)) for name in names}


def sample_curve(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, Metrics]:
    """Scores of the first 1, 2, 4, … samples."""
    counts = [2**k for k in range(int(np.log2(len(log_probs))) + 1)]
    return {str(count): scores(log_probs[:count], labels) for count in counts}


def compute(options: Options) -> None:
    """Chooses settings, and tests them."""
    if options.data is None:
        raise SystemExit("name the folder of cifar-10-batches-py with --data DIR")
    grids = options.grids
    try:
        study = Study(options, options.data)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    tried = {method: settings(grid) for method, grid in grids.items()}
    searched = sum(len(x) for x in tried.values() if len(x) > 1)
    averages = sum((method, "together") in WAYS for method in tried) * (options.seeds > 1)
    total = searched + len(tried) * options.seeds + averages
    journal = Journal(options.results, total=total)
    for method, choices in tried.items():
        best = choices[0]
        if len(choices) > 1:
            found = [
                journal.compute(
                    options.run("validation", method, values, epochs=study.preset.epochs_to_choose),
                    partial(study.validated, method, values),
                )
                for values in choices
            ]
            best = best_of(choices, [chosen_by(x) for x in found])
        for seed in range(options.seeds):
            run = options.run("test", method, best, seed=seed)
            journal.compute(run, partial(study.tested, method, seed, best))
        if options.seeds > 1 and (method, "together") in WAYS:
            run = options.run("together", method, best, runs=options.seeds)
            journal.compute(run, partial(study.together, method, best))


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal) -> None:
    """Tables of every experiment, and the entropies of the first."""
    tables: dict[str, Sequence[Sequence[str]]] = {}
    figure = None
    for (preset, noise, longer), runs in grouped(journal.select(), *FIELDS).items():
        name = preset + (f", {noise:.0%} wrong labels" if noise else "")
        name += f", {longer} times as long" if longer > 1 else ""
        tried, tested, together = (
            [x for x in runs if x[0]["stage"] == stage]
            for stage in ("validation", "test", "together")
        )
        if tested:
            tables[name] = way_rows(WAYS, tested, together)
        if ivon := [x for x in tested if x[0]["method"] == "ivon"]:
            curves = [x["curve"] for _, x in current(ivon)]
            tables[f"{name}: IVON's samples"] = curve_rows(curves)
        if tried:
            grid_of = lambda run: GRIDS[run["method"]]  # noqa: E731
            tables[f"{name}: settings"] = setting_rows(tried, grid_of, METHODS)
        figure = figure or draw(journal.path.with_suffix(""), tested)
    notes = (
        "Mean ± standard error over runs, in % but for NLL. `runs`: of these, or averaged by an "
        "ensemble or a mixture. Last columns: areas under the ROC of the entropy, by which other "
        "images are told from test images. A step of SAM takes two gradients. Wrong labels are "
        "only in the training images, not in those that choose the settings."
    )
    write_tables(journal, "CIFAR-10 with ResNet-20", tables, notes)
    if figure is not None:
        save_figure(figure, journal.path.with_suffix(".png"))


FIELDS = "preset", "noise", "longer"


def curve_rows(curves: Sequence[Mapping[str, Metrics]]) -> list[list[str]]:
    """Scores against the number of samples."""
    names = list(next(iter(curves[0].values())))
    rows = [["samples", *names]]
    for count in curves[0]:
        rows.append([count, *(shown(name, [c[count][name] for c in curves]) for name in names)])
    return rows


def draw(folder: Path, tested: Runs) -> Figure | None:
    """Entropies of test images and of others, by the last run of three methods."""
    last = {run["method"]: file_of(folder, run) for run, _ in tested}
    files = {m: last[m] for m in ("sgd", "adamw", "ivon") if m in last and last[m].is_file()}
    if not files:
        return None
    figure = Figure(figsize=(4 * len(files), 3.4), layout="constrained")
    axes = np.ravel(figure.subplots(1, len(files), sharey=True))
    for ax, (method, file) in zip(axes, files.items(), strict=True):
        with np.load(file) as found:
            logs = {name or "CIFAR-10": jnp.asarray(found[name]) for name in found.files}
        entropies = {name: np.asarray(metrics.predictive_entropy(x)) for name, x in logs.items()}
        draw_entropies(ax, METHODS[method], entropies)
    axes[0].autoscale(axis="y")
    return figure


main: Callable[..., None] = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
