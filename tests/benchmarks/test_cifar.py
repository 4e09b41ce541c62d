"""The CIFAR-10 evidence on made-up images and a small network."""

import pickle

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.comparing import setting_rows
from benchmarks._shared.networks import ResNet
from benchmarks.evidence.cifar import data, main, methods
from examples._shared.datasets import DataError

VALUES = {
    "sgd": {"learning_rate": 0.1, "weight_decay": 1e-3},
    "adamw": {"learning_rate": 0.01, "weight_decay": 0.1},
    "sam": {"learning_rate": 0.1, "weight_decay": 1e-3, "rho": 0.1},
    "dropout": {"learning_rate": 0.1, "weight_decay": 1e-3, "rate": 0.1},
    "swag": {"learning_rate": 0.1, "weight_decay": 1e-3, "swag_rate": 0.05},
    "ivon": {"learning_rate": 0.1, "weight_decay": 1e-3, "hess_init": 1.0, "sharpness": 5.0},
}


@pytest.fixture
def folder(tmp_path):
    """CIFAR-10's files with eight images each, whose first channel says the class."""
    rng = np.random.default_rng(0)
    inside = tmp_path / data.FOLDER
    inside.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = rng.integers(0, 10, 8)
        images = rng.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
        images[:, 0] = 25 * labels[:, None, None]
        batch = {b"data": images.reshape(8, -1), b"labels": labels.tolist()}
        (inside / name).write_bytes(pickle.dumps(batch))
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(methods, "NETWORK", ResNet((4,), stem_stride=4))


def test_files_are_read_with_channels_last_and_their_labels(folder):
    train, test = data.load_cifar10(folder)
    assert train.images.shape == (40, 32, 32, 3) and test.images.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(train.images[:, 5, 7, 0], 25 * train.labels)
    again, _ = data.load_cifar10(folder / data.FOLDER)
    np.testing.assert_array_equal(again.images, train.images)


def test_missing_and_damaged_files_are_named(folder):
    (folder / data.FOLDER / "data_batch_3").write_bytes(b"junk")
    with pytest.raises(DataError, match="data_batch_3 is damaged"):
        data.load_cifar10(folder)
    (folder / data.FOLDER / "data_batch_3").unlink()
    with pytest.raises(DataError, match="looked for data_batch_3"):
        data.load_cifar10(folder)


def test_augmentation_moves_and_mirrors_and_changes_nothing_else():
    image = np.random.default_rng(0).random((32, 32, 3)).astype(np.float32)
    found = np.asarray(data.augment(jax.random.key(0), jnp.asarray(np.stack([image] * 64))))
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    seen, matches = set(), 0
    for each in found:
        for flip in (False, True):
            for top, left in np.ndindex(9, 9):
                crop = padded[top : top + 32, left : left + 32]
                if np.array_equal(each, crop[:, ::-1] if flip else crop):
                    seen.add((flip, top, left))
                    matches += 1
    assert matches == 64 and len(seen) > 45  # of 162
    assert {flip for flip, *_ in seen} == {False, True}


def test_wrong_labels_are_as_many_as_asked_for_and_always_the_same():
    original = data.Images(np.zeros((100, 1)), np.arange(100) % 10)
    noisy = data.with_noise(original, 0.2)
    assert (noisy.labels != original.labels).sum() == 20
    np.testing.assert_array_equal(noisy.labels, data.with_noise(original, 0.2).labels)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", ["ivon", "swag"])
def test_a_run_that_was_stopped_ends_where_it_would_have(folder, tmp_path, monkeypatch, method):
    images = data.floats(data.load_cifar10(folder)[0])
    run = methods.Run(method, epochs=4, batch_size=8, num_train=40)
    whole = methods.train(run, VALUES[method], images, 0, tmp_path)
    written = methods.write

    def stopping(file, epoch, *rest):
        written(file, epoch, *rest)
        if epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(methods, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        methods.train(run, VALUES[method], images, 0, tmp_path)
    monkeypatch.setattr(methods, "write", written)
    resumed = methods.train(run, VALUES[method], images, 0, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.usefixtures("small")
def test_an_epoch_in_one_program_is_its_steps(folder):
    images = data.floats(data.load_cifar10(folder)[0])
    run = methods.Run("sgd", epochs=2, batch_size=8, num_train=40)
    keys, rows = jax.random.split(jax.random.key(0), 5), np.arange(40).reshape(5, 8)
    first = methods.start(run, VALUES["sgd"], jax.random.key(1), images.images[:1])
    on_device = data.Images(*map(jnp.asarray, images))
    at_once = methods.one_epoch(run, VALUES["sgd"], first, on_device, keys, rows)
    carry = methods.start(run, VALUES["sgd"], jax.random.key(1), images.images[:1])
    for key, each in zip(keys, rows, strict=True):
        carry = methods.one_step(run, VALUES["sgd"], carry, on_device, key, each)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), at_once, carry
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_command_compares_all_methods_and_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(main.PRESETS, "laptop", main.Preset(24, 8, 8, 2, 1, 8, 2))
    grids = {name: {k: (x,) for k, x in values.items()} for name, values in VALUES.items()}
    grids["sgd"]["learning_rate"] = (0.1, 0.2)  # pyright: ignore
    monkeypatch.setattr(main, "GRIDS", grids)
    np.savez(tmp_path / "tiny.npz", images=np.zeros((4, 32, 32, 3), np.uint8))
    results = tmp_path / "cifar.jsonl"
    argv = ["--data", str(folder), "--unfamiliar", str(tmp_path / "tiny.npz"), "--seeds", "2"]
    main.main([*argv, "--results", str(results)])
    page = results.with_suffix(".md").read_text()
    rows = {line.split("  ")[0] for line in page.splitlines()}
    assert rows >= set(main.WAYS.values()) and "Tiny ImageNet, entropy" in page
    assert "(chosen" in page and "IVON's samples" in page and "nan" not in page
    assert results.with_suffix(".png").stat().st_size > 10_000
    written = results.read_text()
    main.main([*argv, "--results", str(results)])
    assert results.read_text() == written
    main.main([*argv[:-1], "1", "--methods", "sam", "--results", str(tmp_path / "sam.jsonl")])
    for path in results.with_suffix("").glob("*.npz"):
        path.unlink()
    with pytest.raises(SystemExit, match="lacks predictions"):
        main.main([*argv[:-1], "3", "--methods", "sgd", "--results", str(results)])
    with pytest.raises(SystemExit, match="at least 1"):
        main.main([*argv, "--noise", "-0.1", "--results", str(results)])
    with pytest.raises(SystemExit, match="no settings of sam"):
        main.main([*argv, "--preset", "paper", "--methods", "sam", "--results", str(results)])


def test_a_setting_that_diverged_says_so_and_is_not_chosen():
    rates, losses = (1.0, 0.3, 0.1), (np.nan, 0.9, 1.0)
    runs = [
        (
            {"method": "sgd", "values": {"learning_rate": rate}},
            {"point": {"accuracy": 0.5, "nll": nll, "ece": 0.1}},
        )
        for rate, nll in zip(rates, losses, strict=True)
    ]
    rows = setting_rows(runs, lambda _: {"learning_rate": rates}, {"sgd": "SGD"})
    assert [row[2] for row in rows[1:]] == ["diverged", "0.900", "1.000"]
    assert [row[0].endswith(" (chosen)") for row in rows[1:]] == [False, True, False]
