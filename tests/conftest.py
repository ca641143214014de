"""Configures every test: eight CPU devices, a quiet TensorFlow and an empty gin."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Spinning OpenMP threads occupy the cores of other processes: t-SNE took six times as
# long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import gin
import pytest
from absl import logging

import trainer  # noqa: F401  Chooses Keras 2, before TensorFlow is imported.

_NUM_CPU_DEVICES = 8
_EXCUSES = ("GPU", "TPU")


def pytest_configure(config):
  """Divides the CPU before anything initialises TensorFlow."""
  if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
    return  # Other processes run the tests.
  from trainer.distribute.strategy import divide_cpu

  divide_cpu(_NUM_CPU_DEVICES)


@functools.cache
def _mirrored(num_replicas):
  from trainer.distribute.strategy import mirrored_on_cpu

  return mirrored_on_cpu(num_replicas)


@pytest.fixture
def mirrored():
  """Returns the MirroredStrategy of n virtual replicas, shared by all tests."""
  return _mirrored


@pytest.fixture(autouse=True)
def _level_of_logging():
  """Restores the logging level after commands that set it."""
  level = logging.get_verbosity()
  yield
  logging.set_verbosity(level)


@pytest.fixture(autouse=True)
def _gin_without_config():
  gin.clear_config()
  yield
  gin.clear_config()


def pytest_terminal_summary(terminalreporter):
  for reason in _unexcused(terminalreporter):
    terminalreporter.write_line(f"a skip that CI does not accept: {reason}", red=True)


def pytest_sessionfinish(session):
  """Under CI, a skip is a failure unless an accelerator is missing."""
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  if reporter and session.exitstatus == pytest.ExitCode.OK and _unexcused(reporter):
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexcused(reporter):
  """Returns the reasons of skips that CI does not accept."""
  if os.environ.get("CI") != "true":
    return []
  reasons = [str(report.longrepr[-1]) for report in reporter.stats.get("skipped", [])]
  return [reason for reason in reasons if not any(word in reason for word in _EXCUSES)]
