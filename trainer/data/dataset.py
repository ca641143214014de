"""A dataset as a run sees it: records, the two sides of its classes, and a decoder."""

from __future__ import annotations

import gin

from trainer.data.decode import Decoder
from trainer.data.records import RecordIndex
from trainer.data.split import Split


@gin.register
class Dataset:
  """Records of classes that train, and of others that evaluate.

  Attributes:
    index: the records.
    train_classes: int32 ids.
    evaluation_classes: int32 ids, disjoint from `train_classes`.
    decoder: makes inputs of records.

  Args:
    folder: folder of TFRecord shards with their index, or a pattern of shards.
    split: divides the classes.
    decoder: makes inputs of records.

  Raises:
    UserError: there is no index, or one side has no class.
  """

  def __init__(self, *, folder: str, split: Split, decoder: Decoder):
    self.index = RecordIndex.open(folder)
    self.train_classes, self.evaluation_classes = split.split(self.index.class_names)
    self.decoder = decoder
