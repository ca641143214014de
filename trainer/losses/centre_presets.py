"""Losses against class centres with the values of a reference implementation.

The references differ in three points. Whether the gradient passes through the arc
cosine: in insightface it does not, which is "straight_through". How angles beyond π − m
are treated: PyTorch Metric Learning continues along a line, insightface does not treat
them. What a class that is filtered out keeps: in insightface, a logit of 0.
"""

from __future__ import annotations

import math
from typing import Optional

import gin

from trainer.errors import UserError
from trainer.losses.centre_losses import (
  ArcFaceLoss,
  ArcOptions,
  CombinedMarginLoss,
  CosFaceLoss,
  NormFaceLoss,
)
from trainer.losses.centre_products import ClassFilter
from trainer.losses.class_centres import ClassCentres
from trainer.losses.proxy_losses import ProxyAnchorLoss, SoftTripleLoss

_INSIGHTFACE_ARC = ArcOptions(beyond_pi="none", gradient="straight_through")


@gin.register
def insightface_arcface(
  *, centres: ClassCentres, margin: float = 0.5, scale: float = 64.0
) -> ArcFaceLoss:
  """Returns `ArcFace` of insightface's PyTorch package."""
  return ArcFaceLoss(centres=centres, margin=margin, scale=scale, arc=_INSIGHTFACE_ARC)


@gin.register
def insightface_cosface(
  *, centres: ClassCentres, margin: float = 0.4, scale: float = 64.0
) -> CosFaceLoss:
  """Returns `CosFace` of insightface's PyTorch package."""
  return CosFaceLoss(centres=centres, margin=margin, scale=scale)


@gin.register
def insightface_combined(
  *,
  centres: ClassCentres,
  angle_margin: float = 0.5,
  cosine_margin: float = 0.0,
  scale: float = 64.0,
  ignored_above: Optional[float] = None,
) -> CombinedMarginLoss:
  """Returns `CombinedMarginLoss` of insightface's PyTorch package.

  Args:
    centres: the class centres.
    angle_margin: its m2, in radians.
    cosine_margin: its m3. The reference ignores m2 if m3 is above 0.
    scale: its s.
    ignored_above: its `interclass_filtering_threshold`; None for its 0.

  Raises:
    UserError: both margins are above 0, or one is out of its range.
  """
  if angle_margin and cosine_margin:
    raise UserError(
      f"insightface_combined has angle_margin={angle_margin} and cosine_margin="
      f"{cosine_margin}; insightface uses one of them, so set the other to 0."
    )
  class_filter = None
  if ignored_above is not None:
    class_filter = ClassFilter(ignored_above, keeps_zero=True)
  return CombinedMarginLoss(
    centres=centres,
    angle_margin=angle_margin,
    cosine_margin=cosine_margin,
    scale=scale,
    arc=_INSIGHTFACE_ARC,
    class_filter=class_filter,
  )


@gin.register
def pml_arcface(
  *, centres: ClassCentres, margin_degrees: float = 28.6, scale: float = 64.0
) -> ArcFaceLoss:
  """Returns PyTorch Metric Learning's `ArcFaceLoss` or `SubCenterArcFaceLoss`."""
  return ArcFaceLoss(centres=centres, margin=math.radians(margin_degrees), scale=scale)


@gin.register
def pml_cosface(
  *, centres: ClassCentres, margin: float = 0.35, scale: float = 64.0
) -> CosFaceLoss:
  """Returns PyTorch Metric Learning's `CosFaceLoss`."""
  return CosFaceLoss(centres=centres, margin=margin, scale=scale)


@gin.register
def pml_norm_face(*, centres: ClassCentres, temperature: float = 0.05) -> NormFaceLoss:
  """Returns PyTorch Metric Learning's `NormalizedSoftmaxLoss`.

  Args:
    centres: the class centres.
    temperature: above 0.

  Raises:
    UserError: the temperature is not above 0.
  """
  _check_temperature("pml_norm_face", temperature)
  return NormFaceLoss(centres=centres, scale=1 / temperature)


@gin.register
def pml_proxy_anchor(
  *, centres: ClassCentres, margin: float = 0.1, alpha: float = 32.0
) -> ProxyAnchorLoss:
  """Returns PyTorch Metric Learning's `ProxyAnchorLoss`."""
  return ProxyAnchorLoss(centres=centres, scale=alpha, margin=margin)


@gin.register
def pml_soft_triple(*, centres: ClassCentres) -> SoftTripleLoss:
  """Returns PyTorch Metric Learning's `SoftTripleLoss`, which has no regulariser."""
  return SoftTripleLoss(centres=centres, regularization=0.0)


@gin.register
def proxy_nca_plus_plus(
  *, centres: ClassCentres, temperature: float = 1 / 9
) -> NormFaceLoss:
  """Returns Proxy-NCA++: a softmax over −d²/T of unit vectors, where d² = 2 − 2c.

  Source: Teh et al. 2020, https://arxiv.org/abs/2004.01113.

  Args:
    centres: the class centres, the paper's proxies.
    temperature: T > 0.

  Raises:
    UserError: the temperature is not above 0.
  """
  _check_temperature("proxy_nca_plus_plus", temperature)
  return NormFaceLoss(centres=centres, scale=2 / temperature)


def _check_temperature(name: str, temperature: float) -> None:
  if not 0 < temperature < math.inf:
    raise UserError(f"{name}.temperature={temperature} is not above 0; try 0.05.")
