from __future__ import annotations

import pytest

from trainer import losses
from trainer.errors import UserError


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: losses.ContrastiveLoss(margin=0), "margin=0 is not above 0"),
    (lambda: losses.LiftedStructureLoss(margin=-1), "margin=-1 is not above 0"),
    (lambda: losses.MultiSimilarityLoss(negative_scale=0), "negative_scale=0"),
    (lambda: losses.CircleLoss(margin=1, scale=80), "margin=1 is not in"),
    (lambda: losses.CircleLoss(margin=0.4, scale=0), "scale=0 is not above 0"),
  ],
)
def test_impossible_constant_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()
