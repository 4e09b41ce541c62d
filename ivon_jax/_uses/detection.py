"""Telling out-of-domain inputs from in-domain ones by a score."""

from typing import Any, NamedTuple

import numpy as np


class Detection(NamedTuple):
    """How well a score tells out-of-domain inputs from in-domain ones; each between 0 and 1.

    Attributes:
      auroc: area under the receiver operating characteristic; 0.5 is chance.
      aupr_out: average precision with out-of-domain inputs as positives.
      aupr_in: average precision with in-domain inputs as positives.
      fpr95: share of out-of-domain inputs below the threshold that keeps 95 % of in-domain ones.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr95: float


def detection(in_scores: Any, out_scores: Any) -> Detection:
    """Detection of out-of-domain inputs by a score, on the host with scikit-learn.

    FPR95 is interpolated on the ROC curve with in-domain inputs as positives.

    Args:
      in_scores: (n,) scores of in-domain inputs.
      out_scores: (m,) scores of out-of-domain inputs; larger means "out of domain".

    Returns:
      A `Detection` of Python floats.

    Raises:
      ImportError: if scikit-learn is not installed.
      ValueError: if the scores are not two non-empty vectors of finite numbers.

    Example:
      >>> from ivon_jax import metrics
      >>> metrics.detection([0.1, 0.2, 0.3], [0.8, 0.9]).auroc
      1.0
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    except ModuleNotFoundError as error:
        raise ImportError("detection needs scikit-learn: pip install scikit-learn") from error
    scores = [np.asarray(x, np.float64) for x in (in_scores, out_scores)]
    for name, values in zip(("in_scores", "out_scores"), scores, strict=True):
        if values.ndim != 1 or not values.size or not np.all(np.isfinite(values)):
            raise ValueError(
                f"{name} must be a non-empty vector of finite numbers; got shape {values.shape}."
            )
    both = np.concatenate(scores)
    is_out = np.repeat([0, 1], [len(x) for x in scores])
    false_rate, true_rate, _ = roc_curve(1 - is_out, -both, drop_intermediate=False)
    return Detection(
        auroc=float(roc_auc_score(is_out, both)),
        aupr_out=float(average_precision_score(is_out, both)),
        aupr_in=float(average_precision_score(1 - is_out, -both)),
        fpr95=_interpolate_rate(true_rate, false_rate, 0.95),
    )


def _interpolate_rate(true_rate: np.ndarray, false_rate: np.ndarray, at: float) -> float:
    # np.interp is arbitrary where the curve has several points of one true-positive rate.
    after = int(np.argmax(true_rate >= at))  # the curve starts at 0
    ends = slice(after - 1, after + 1)
    return float(np.interp(at, true_rate[ends], false_rate[ends]))
