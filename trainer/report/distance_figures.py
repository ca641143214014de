"""How far positives and negatives are apart, and recall@k, as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.report import axes, plot
from trainer.retrieval.evidence import Histogram

_POSITIVE, _NEGATIVE = 0, 1


def histogram(found: Histogram) -> str:
  """Shares of the sampled pairs by distance.

  Args:
    found: the counts.
  """
  series = [
    plot.Series("same class", _outline(found, found.positive), "bars", _POSITIVE),
    plot.Series(
      "different classes", _outline(found, found.negative), "bars", _NEGATIVE
    ),
  ]
  series = [each for each in series if each.points]
  if not series:
    return ""
  x_axis = axes.linear([found.low, found.high])
  medians = {_POSITIVE: found.positive_median, _NEGATIVE: found.negative_median}
  lines = "".join(
    f'<path class="median" style="--color:var(--c{color})" '
    f'd="M{x_axis.place(median)} 0V100"/>'
    for color, median in medians.items()
    if median is not None
  )
  num_pairs = max(sum(found.positive), sum(found.negative))
  return plot.figure(
    "Distances of pairs",
    series,
    x_axis=x_axis,
    y_axis=axes.linear([0.0, *(y for each in series for _, y in each.points)], 3),
    x_name="distance",
    note=f"Share of {num_pairs:,} pairs of each kind, drawn at random, in each of "
    f"{len(found.positive)} bins; dotted: medians.",
    extra=lines,
  )


def recall_curves(recall_at: Mapping[str, Sequence[float]]) -> str:
  """Recall@k for every k, of one run or several in one frame; empty for none.

  Args:
    recall_at: for k = 1, 2, ..., by the name of the run; one run needs none.
  """
  if not recall_at:
    return ""
  series = [
    plot.Series(
      name if len(recall_at) > 1 else "",
      [(float(k), value) for k, value in enumerate(values, 1)],
    )
    for name, values in recall_at.items()
  ]
  points = [point for each in series for point in each.points]
  last = max(k for k, _ in points)
  return plot.figure(
    f"Recall@k to k = {last:.0f}",
    series,
    x_axis=axes.logarithmic(1, max(2.0, last)),
    y_axis=axes.linear([1.0, *(value for _, value in points)], 3, is_rounded=True),
    x_name="k",
    note="Share of queries with an item of their class among the k nearest.",
  )


def _outline(found: Histogram, counts: Sequence[int]) -> list[tuple[float, float]]:
  """The middle of each bin and the share of pairs in it."""
  total = sum(counts)
  width = (found.high - found.low) / len(counts)
  return [
    (found.low + (i + 0.5) * width, count / total)
    for i, count in enumerate(counts)
    if total
  ]
