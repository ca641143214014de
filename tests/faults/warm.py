"""What the runs of the fault table import, once, before they are forked."""

import trainer.cli.train
import trainer.cli.train_and_evaluate  # noqa: F401
