"""CIFAR-10 with ResNet-20: SGD, AdamW, SAM, MC-dropout, SWAG, ensembles, and IVON.

    python benchmarks/evidence/cifar/main.py --data DIR                      # 5,000 images
    python benchmarks/evidence/cifar/main.py --data DIR --preset reference   # for a GPU
    python benchmarks/evidence/cifar/main.py --report                        # tables and figure

DIR holds `cifar-10-batches-py`. ResNet-20 with filter response normalisation is trained on random
crops and mirror images. Every method tries the six settings of its grid, takes that with the lowest
NLL on other training images, and is tested once with each seed; the ensemble and the mixture
average the probabilities of all seeds' runs. `paper` has the settings of the paper and tries none.
On two cores a run of `laptop` takes some eight minutes. Runs go on after the last epoch that was
finished.
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

from benchmarks._shared.journal import Evidence, Journal, Runs, command, grouped, write_tables
from benchmarks._shared.methods import average
from benchmarks._shared.tuning import Grid, at_edges, described, settings
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
from examples._shared.reporting import COLORS, cell, save_figure
from ivon_jax import metrics


class Preset(NamedTuple):
    """Sizes of an experiment."""

    num_train: int
    num_valid: int  # further training images, which choose the settings
    num_test: int
    epochs: int
    batch_size: int
    samples: int


PRESETS = {
    "laptop": Preset(5_000, 2_000, 5_000, 30, 50, 16),
    "reference": Preset(40_960, 9_040, 10_000, 312, 256, 512),  # 49,920 steps
    "paper": Preset(50_000, 0, 10_000, 200, 50, 512),
}
# Six settings each. IVON's `sharpness` is ess/N.
GRIDS: dict[str, Grid] = {
    "sgd": {"learning_rate": (0.03, 0.1, 0.3), "weight_decay": (5e-4, 3e-3)},
    "adamw": {"learning_rate": (1e-3, 3e-3, 1e-2), "weight_decay": (0.03, 0.3)},
    "sam": {"learning_rate": (0.1, 0.3), "rho": (0.03, 0.1, 0.2), "weight_decay": (5e-4,)},
    "dropout": {"learning_rate": (0.1, 0.3), "rate": (0.03, 0.1, 0.2), "weight_decay": (5e-4,)},
    "swag": {"learning_rate": (0.1, 0.3), "swag_rate": (0.01, 0.03, 0.1), "weight_decay": (5e-4,)},
    "ivon": {
        "learning_rate": (0.1, 0.3),
        "sharpness": (1.0, 5.0, 25.0),
        "hess_init": (1.0,),
        "weight_decay": (5e-4,),
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
        return {"preset": self.preset, "noise": self.noise, "longer": self.longer}

    @property
    def folder(self) -> Path:
        """Where unfinished runs are, and predictions for ensembles and the figure."""
        found = self.results.with_suffix("")
        found.mkdir(exist_ok=True)
        return found

    def predictions(self, method: str, seed: int) -> Path:
        """Log-probabilities of a tested run."""
        name = "_".join(map(str, (*self.identity.values(), method, seed)))
        return self.folder / f"{name}.npz"


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

    def fitted(self, method: str, seed: int, values: Mapping[str, Any]) -> Any:
        """What a run ends with."""
        epochs = self.preset.epochs * self.options.longer
        run = Run(method, epochs, self.preset.batch_size, self.preset.num_train)
        return methods.train(run, values, self.train, seed, self.options.folder)

    def validated(self, method: str, values: Mapping[str, Any]) -> Metrics:
        """Scores of a setting on validation images."""
        fitted = self.fitted(method, 0, values)
        predicted = self.predict(fitted, values, jax.random.key(1), self.valid.images)
        return {way: scores(x, self.valid.labels) for way, x in predicted.items()}

    def tested(self, method: str, seed: int, values: Mapping[str, Any]) -> Metrics:
        """Scores on test images, and the detection of unfamiliar ones."""
        fitted = self.fitted(method, seed, values)
        inputs = {"": self.test.images, **self.others}
        key = jax.random.key(seed)
        predicted = {k: self.predict(fitted, values, key, x) for k, x in inputs.items()}
        best = "samples" if "samples" in predicted[""] else "point"
        kept: Any = {name: averaged(x[best]) for name, x in predicted.items()}
        np.savez(self.options.predictions(method, seed), **kept)
        ways = predicted[""]
        found = {way: self.scored({k: x[way] for k, x in predicted.items()}) for way in ways}
        if method == "ivon":
            found["curve"] = sample_curve(ways["samples"], self.test.labels)
        return found

    def together(self, method: str) -> Metrics:
        """Scores of the average of all seeds' probabilities."""
        runs = [np.load(self.options.predictions(method, k)) for k in range(self.options.seeds)]
        stacked = {name: np.stack([run[name] for run in runs]) for name in runs[0].files}
        return {"together": self.scored(stacked)}

    def scored(self, log_probs: dict[str, np.ndarray]) -> Metrics:
        """Scores on test images, named "", and how well others are told from them."""
        found = scores(log_probs[""], self.test.labels)
        entropy = {k: metrics.predictive_entropy(averaged(x)) for k, x in log_probs.items()}
        for name in self.others:
            found[f"{name}, entropy"] = float(metrics.detection(entropy[""], entropy[name]).auroc)
        return found


def averaged(log_probs: np.ndarray) -> Any:
    """Log-probabilities (n, 10), averaged over samples where there are several."""
    return log_probs if log_probs.ndim == 2 else np.asarray(average(jnp.asarray(log_probs)))


def scores(log_probs: np.ndarray, labels: np.ndarray) -> Metrics:
    """Metrics of log-probabilities (n, 10), or of the average of (S, n, 10)."""
    x, y = jnp.asarray(averaged(log_probs)), jnp.asarray(labels)
    names = ("accuracy", "nll", "ece", "brier")
    return {name: float(getattr(metrics, name)(x, y)) for name in names}


def sample_curve(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, Metrics]:
    """Scores of the first 1, 2, 4, … samples."""
    counts = [2**k for k in range(int(np.log2(len(log_probs))) + 1)]
    return {str(count): scores(log_probs[:count], labels) for count in counts}


def chosen_by(result: Mapping[str, Any]) -> float:
    """The NLL that chooses: of samples, where there are samples."""
    return result.get("samples", result["point"])["nll"]


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
    journal = Journal(options.results, total=searched + len(tried) * options.seeds)
    for method, choices in tried.items():
        common = {**options.identity, "method": method}
        best = choices[0]
        if len(choices) > 1:
            found = [
                journal.compute(
                    {"stage": "validation", **common, "values": values},
                    partial(study.validated, method, values),
                )
                for values in choices
            ]
            nll = np.nan_to_num([chosen_by(x) for x in found], nan=np.inf)
            best = choices[int(np.argmin(nll))]
        for seed in range(options.seeds):
            run = {"stage": "test", **common, "values": best, "seed": seed}
            journal.compute(run, partial(study.tested, method, seed, best))
        if options.seeds > 1 and (method, "together") in WAYS:
            run = {"stage": "together", **common, "values": best, "runs": options.seeds}
            journal.compute(run, partial(study.together, method))


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal) -> None:
    """Tables of every experiment, and the figure of the first."""
    tables: dict[str, Sequence[Sequence[str]]] = {}
    fields = "preset", "noise", "longer"
    for identity, runs in grouped(journal.select(), *fields).items():
        noise = f", {identity[1]:.0%} wrong labels" if identity[1] else ""
        name = identity[0] + noise + (f", {identity[2]} times as long" if identity[2] > 1 else "")
        of = {stage: [(r, x) for r, x in runs if r["stage"] == stage] for stage in STAGES}
        if of["test"]:
            tables[name] = test_rows(of["test"] + of["together"])
        if curves := [x["curve"] for _, x in of["test"] if "curve" in x]:
            tables[f"{name}: IVON's samples"] = curve_rows(curves)
        if of["validation"]:
            tables[f"{name}: settings"] = setting_rows(of["validation"])
    notes = (
        "Mean ± standard error over runs, in % but for NLL. `runs`: of these, or averaged by an "
        "ensemble or a mixture. Last columns: areas under the ROC of the entropy, by which other "
        "images are told from test images."
    )
    write_tables(journal, "CIFAR-10 with ResNet-20", tables, notes)
    first = journal.select(stage="test")
    if first:
        folder = journal.path.with_suffix("")
        save_figure(draw(folder, first), journal.path.with_suffix(".png"))


STAGES = ("validation", "test", "together")


def test_rows(runs: Runs) -> list[list[str]]:
    """A row for each way to predict, a column for each metric."""
    names = list(
        dict.fromkeys(n for _, x in runs for way, s in x.items() if way != "curve" for n in s)
    )
    rows = [["", "runs", *names]]
    for (method, way), title in WAYS.items():
        group = [(run, x[way]) for run, x in runs if run["method"] == method and way in x]
        if group:
            cells = (shown(name, [x[name] for _, x in group if name in x]) for name in names)
            rows.append([title, str(group[0][0].get("runs", len(group))), *cells])
    return rows


def shown(name: str, values: Sequence[float]) -> str:
    """A cell of the table."""
    if not values:
        return ""
    return cell(values, 3) if name == "nll" else cell(100 * np.asarray(values), 1 + (name == "ece"))


def curve_rows(curves: Sequence[Mapping[str, Metrics]]) -> list[list[str]]:
    """Scores against the number of samples."""
    names = list(next(iter(curves[0].values())))
    rows = [["samples", *names]]
    for count in curves[0]:
        rows.append([count, *(shown(name, [c[count][name] for c in curves]) for name in names)])
    return rows


def setting_rows(runs: Runs) -> list[list[str]]:
    """Validation scores of every setting; the chosen one is marked, and where it is an edge."""
    rows = [["setting", "accuracy, %", "NLL", "ECE, %"]]
    for (method,), mine in grouped(runs, "method").items():
        best = min(mine, key=lambda x: np.nan_to_num(chosen_by(x[1]), nan=np.inf))[0]
        edges = ", ".join(at_edges(GRIDS[method], best["values"]))
        for run, result in mine:
            mark = f" (chosen{'; edge: ' + edges if edges else ''})" if run is best else ""
            x = result.get("samples", result["point"])
            cells = f"{100 * x['accuracy']:.1f}", f"{x['nll']:.3f}", f"{100 * x['ece']:.1f}"
            rows.append([f"{METHODS[method]}, {described(run['values'])}{mark}", *cells])
    return rows


def draw(folder: Path, runs: Runs) -> Figure:
    """Entropies of test images and of others, for the first seed of three methods."""
    shown = [m for m in ("sgd", "adamw", "ivon") if any(run["method"] == m for run, _ in runs)]
    figure = Figure(figsize=(4 * len(shown), 3.4), layout="constrained")
    axes = np.ravel(figure.subplots(1, len(shown), sharey=True))
    bins = np.linspace(0, np.log(10), 31)
    for ax, method in zip(axes, shown, strict=True):
        run = next(run for run, _ in runs if run["method"] == method)
        name = "_".join(str(run[k]) for k in ("preset", "noise", "longer", "method", "seed"))
        file = folder / f"{name}.npz"
        if not file.is_file():
            continue
        colors = iter((COLORS["reference"], COLORS["unfamiliar"], COLORS["SGD"]))
        with np.load(file) as found:
            for key in found.files:
                entropy = np.asarray(metrics.predictive_entropy(jnp.asarray(found[key])))
                share = np.histogram(np.maximum(entropy, 0), bins)[0] / len(entropy)
                ax.stairs(share, bins, label=key or "CIFAR-10", color=next(colors), linewidth=1.6)
        ax.set(title=METHODS[method], xlabel="predictive entropy, nats")
        ax.legend(frameon=False)
    axes[0].set_ylabel("share of images")
    return figure


main: Callable[..., None] = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
