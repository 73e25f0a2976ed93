"""The statistics of campaign_report.py: which runs are far behind, and how sure a difference is."""

from collections.abc import Sequence

import numpy as np

FAR_NATS, FAR_DEVIATIONS = 0.03, 4
CONFIDENCE = 0.95
RESAMPLES = 10_000
RESAMPLING_SEED = 0  # fixed, so that a report is a function of the results alone
GRID = 20_001

Interval = tuple[float, float, float]  # the mean, and where it lies with CONFIDENCE


def far_behind(losses: Sequence[float]) -> list[bool]:
    """Which runs of one model ended far behind the others, though none of their numbers was bad.

    Args:
        losses: the validation losses of the model's healthy runs.

    Returns:
        For each run, whether its loss exceeds the runs' median by more than ``FAR_NATS`` and by more than
        ``FAR_DEVIATIONS`` median absolute deviations, which are not scaled to standard deviations. One of two runs
        never does: both lie one such deviation from their median.
    """
    values = np.asarray(losses, dtype=np.float64)
    if not len(values):
        return []
    excess = values - np.median(values)
    deviation = np.median(np.abs(excess))
    return [bool(each) for each in (excess > FAR_NATS) & (excess > FAR_DEVIATIONS * deviation)]


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The ``t`` for which Student's T with so many degrees of freedom has P(|T| ≤ t) = confidence.

    With T = √degrees · tan θ, the density of θ is in proportion to cos(θ)^(degrees - 1), which is smooth and bounded:
    the trapezoidal rule gives more than six digits.
    """
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: expected 1 or more, which two values give")
    angles = np.linspace(0, np.pi / 2, GRID)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(degrees) * np.tan(np.interp(confidence, below / below[-1], angles)))


def over_seeds(differences: Sequence[float]) -> Interval:
    """Mean of the seeds' differences, and its interval by Student's t.

    Raises:
        ValueError: for fewer than two seeds, which have no spread.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds: expected 2 or more; one is compared by document")
    with np.errstate(invalid="ignore"):  # an infinite difference has an interval of NaN
        deviation = values.std(ddof=1)
    half = student_quantile(len(values) - 1) * deviation / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def over_documents(differences: np.ndarray, tokens: np.ndarray) -> Interval:
    """Mean of the documents' differences, weighted by their tokens, and its bootstrap interval over documents.

    The interval says how much the choice of documents matters. It knows nothing of what another seed would give.

    Args:
        differences: of the loss, one a document.
        tokens: how many each document has.
    """
    count = len(differences)
    drawn = np.random.default_rng(RESAMPLING_SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    means = drawn @ (tokens * differences) / np.maximum(drawn @ tokens, 1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(np.average(differences, weights=tokens)), float(low), float(high)


def percent_of_perplexity(interval: Interval) -> Interval:
    """A difference of the loss as a change of perplexity: 100 · (exp(d) - 1)."""
    mean, low, high = (float(100 * np.expm1(value)) for value in interval)
    return mean, low, high
