"""Imports of the task, loaded once before forks."""

import sklearn.manifold  # noqa: F401

import trainer.cli.evaluate
import trainer.cli.train
import trainer.cli.train_and_evaluate  # noqa: F401
