"""What the runs of the fault table import, once, before they are forked."""

import trainer.parts
import trainer.train
import trainer.train_and_evaluate  # noqa: F401
