import pytest

pytest.importorskip("flax")

from examples.logistic_2d import (
    best_diagonal,
    divergence,
    exact_posterior,
    flowers,
    main,
)


def test_the_table_has_every_method_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, epochs=20, figure=figure)
    output = capsys.readouterr().out
    for row in ("exact posterior", "best diagonal Gaussian", "IVON", "SGD", "KL(q‖p)"):
        assert row in output
    assert figure.stat().st_size > 10_000


def test_the_best_diagonal_gaussian_is_a_minimum():
    log_posterior = exact_posterior(*flowers())
    best = best_diagonal(log_posterior)
    least = divergence(best, log_posterior)
    for factor in (0.99, 1.01):
        assert divergence(best._replace(std=factor * best.std), log_posterior) > least
        assert divergence(best._replace(mean=factor * best.mean), log_posterior) > least
