import pytest

pytest.importorskip("flax")

from examples.logistic_2d import (
    best_gaussian,
    divergence,
    exact_posterior,
    flowers,
    main,
)


def test_the_table_has_every_method_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, epochs=20, figure=figure)
    output = capsys.readouterr().out
    for row in (
        "exact posterior",
        "best diagonal Gaussian",
        "best Gaussian",
        "IVON, eigenbasis",
        "SGD",
        "KL(q‖p)",
    ):
        assert row in output
    assert figure.stat().st_size > 10_000


def test_the_best_gaussians_are_minima():
    log_posterior = exact_posterior(*flowers())
    diagonal, full = (best_gaussian(log_posterior, x) for x in (True, False))
    assert diagonal.root[1, 0] == 0
    assert divergence(full, log_posterior) < 0.6 * divergence(diagonal, log_posterior)
    for best in (diagonal, full):
        least = divergence(best, log_posterior)
        for factor in (0.99, 1.01):
            assert divergence(best._replace(root=factor * best.root), log_posterior) > least
            assert divergence(best._replace(mean=factor * best.mean), log_posterior) > least
