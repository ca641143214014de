"""How sure a mean over queries is: its bootstrap interval.

Shapes: Q queries, M metrics.
"""

from __future__ import annotations

import numpy as np

from trainer import heartbeat

_NUM_RESAMPLES = 1000
_CONFIDENCE = 0.95


def bootstrap_intervals(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
  """Percentile intervals of means: 95 % of 1,000 resamples of the queries lie inside.

  All metrics are resampled together. Queries of one class are not independent: where
  classes are few, what new classes would give varies more than this says.

  Args:
    values: [Q, M] float64, Q >= 1.
    seed: of the resampling.

  Returns:
    [M, 2] float64, low and high.

  Source: Efron 1979, Bootstrap methods: another look at the jackknife.
  """
  rng = np.random.default_rng(seed)
  num_queries = len(values)
  means = np.empty([_NUM_RESAMPLES, values.shape[1]])
  for row in means:
    heartbeat.beat()
    drawn = rng.integers(num_queries, size=num_queries)
    row[:] = np.bincount(drawn, minlength=num_queries) @ values / num_queries
  tail = 50 * (1 - _CONFIDENCE)
  return np.percentile(means, [tail, 100 - tail], axis=0).T
