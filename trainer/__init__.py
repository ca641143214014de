"""Distributed training of retrieval models with losses mined inside the batch.

Importing this package chooses Keras 2 before TensorFlow is loaded: Keras 3 cannot
apply an optimizer inside a replica function of `tf.distribute`.
"""

import os as _os
import sys as _sys

__version__ = "0.1.0"

# TensorFlow 2.15, the last for Python 3.11, has Keras 2 built in.
if _sys.version_info >= (3, 12):
  if "tensorflow" in _sys.modules and _os.environ.get("TF_USE_LEGACY_KERAS") != "1":
    raise ImportError(
      "TensorFlow was imported before `trainer` and would use Keras 3; "
      "import trainer first, or set TF_USE_LEGACY_KERAS=1."
    )
  _os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
