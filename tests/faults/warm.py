"""What runs of the task import, once, before they are forked."""

import sklearn.manifold  # noqa: F401

import trainer.cli.evaluate
import trainer.cli.train
import trainer.cli.train_and_evaluate  # noqa: F401
