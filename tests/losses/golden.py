"""Losses and gradients recorded from the seed and from TensorFlow Addons.

A key is CASE/KIND/margin=M/squared=S; it has `VECTORS[key + "/loss"]` and so on.
"""

from __future__ import annotations

import pathlib

import numpy as np
import tensorflow as tf

VECTORS = np.load(pathlib.Path(__file__).parents[1] / "golden" / "triplet.npz")

_TOLERANCE = 1e-5
_ULP = 2.0**-23


def keys(kind):
  """Returns the keys of a kind: batch_all, batch_hard, tfa_hard or tfa_semihard."""
  names = (name[: -len("/loss")] for name in VECTORS if name.endswith("/loss"))
  return sorted(name for name in names if name.split("/")[1] == kind)


def value_and_gradient(loss_fn, key):
  """Returns `loss_fn(labels, embeddings, margin, squared=)` and its gradient."""
  case, _, margin, squared = key.split("/")
  embeddings = tf.constant(VECTORS[f"{case}/embeddings"])
  labels = tf.constant(VECTORS[f"{case}/labels"])
  with tf.GradientTape() as tape:
    tape.watch(embeddings)
    value = loss_fn(
      labels, embeddings, float(margin.split("=")[1]), squared=squared.endswith("True")
    )
    loss = value[0] if isinstance(value, tuple) else value
  return value, tape.gradient(loss, embeddings).numpy()


def assert_value_equals(value, name):
  """Asserts a relative error of at most 1e-5."""
  np.testing.assert_allclose(value, VECTORS[name], rtol=_TOLERANCE, atol=0)


def assert_gradient_equals(gradient, key):
  """Asserts an error within 1e-5 of the largest entry, plus recorded rounding.

  The recorded gradients are of the Gram form, which adds up 2 s x and −2 s y apart, for
  slopes s whose sizes add up to at most 2; the difference 2 s (x − y) is what is left.
  Where all x are equal it is 0 in exact arithmetic, and an ulp of x as recorded. So one
  ulp of 4 max |x|, about 5e-7 for entries of 1, is below what could be recorded.
  """
  expected = VECTORS[f"{key}/gradient"]
  parts = 4 * np.abs(VECTORS[f"{key.split('/')[0]}/embeddings"]).max()
  tolerance = _TOLERANCE * np.abs(expected).max() + _ULP * parts
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance)
