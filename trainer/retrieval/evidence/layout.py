"""Embeddings laid out in the plane.

Shapes: M items, D dimensions.
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

# Below it t-SNE has too few neighbours to go by.
_LEAST_ITEMS = 12
_PERPLEXITY = 30.0
# Principal components that t-SNE starts from, as its authors do.
_NUM_COMPONENTS = 50
# Half of the usual: another 500 lower the divergence of 1,000 items by 4 %.
_NUM_ITERATIONS = 500


def lay_out(embeddings: np.ndarray) -> tuple[str, np.ndarray]:
  """t-SNE of the principal components; these alone where t-SNE can't be had.

  Args:
    embeddings: [M, D] float32, finite.

  Returns:
    "t-SNE" or "PCA", and [M, 2] float64 within 0 to 1, both axes in one scale.

  Source: van der Maaten & Hinton 2008, https://jmlr.org/papers/v9/vandermaaten08a.html
  """
  components = _principal_components(embeddings)
  num_items = len(components)
  if num_items < _LEAST_ITEMS or not components[:, :2].any(axis=0).all():
    return "PCA", _scaled(components[:, :2])
  from sklearn.manifold import TSNE  # Late: pages, which need none, read evidence too.

  estimator = TSNE(
    perplexity=min(_PERPLEXITY, (num_items - 1) / 3),
    init="pca",
    max_iter=_NUM_ITERATIONS,
    random_state=0,
  )
  # Its threads wait for each other at every step: where others have the cores, as
  # TensorFlow's may, two take ten times as long as one.
  with threadpool_limits(1):
    places = estimator.fit_transform(components.astype(np.float32))
  return "t-SNE", _scaled(places.astype(np.float64))


def _principal_components(embeddings: np.ndarray) -> np.ndarray:
  """[M, >= 2] float64, the largest first; 0 where there is no variance."""
  centred = embeddings.astype(np.float64)
  centred -= centred.mean(axis=0)
  left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
  # Smaller ones are rounding errors.
  sizes = np.where(sizes > 1e-6 * max(np.abs(embeddings).max(), 1e-30), sizes, 0.0)
  components = (left * sizes)[:, :_NUM_COMPONENTS]
  return np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1]))))


def _scaled(places: np.ndarray) -> np.ndarray:
  low, high = places.min(axis=0), places.max(axis=0)
  span = (high - low).max() or 1.0
  return 0.5 + (places - (low + high) / 2) / span
