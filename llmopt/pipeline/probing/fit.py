"""Speeds from times: how much each of several things costs, none of them less than nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls


def fitted(amounts: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> dict[str, float]:
    """Seconds a unit of each amount, so that the relative errors of all times are least squares (Lawson, Hanson 1974).

    An amount that explains nothing costs 0.
    """
    times = np.array(seconds)
    relative = np.array([np.array(column) / times for column in amounts.values()]).T
    scale = np.linalg.norm(relative, axis=0)
    found, _ = nnls(relative / scale, np.ones(len(times)))
    return dict(zip(amounts, (found / scale).tolist(), strict=True))


def per_second(cost_s: float) -> float | None:
    """Units a second; None where they cost nothing."""
    return 1 / cost_s if cost_s > 0 else None
