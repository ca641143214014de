"""Loss and mining by step, for one run or several in one frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.report import axes, plot

# Metrics drawn, each with its title; those that no run logs are left out.
TITLES = {
  "train/loss": "Loss",
  "mining/active_fraction": "Active fraction",
  "mining/hardest_positive_distance": "Mean distance of the hardest positive",
  "mining/hardest_negative_distance": "Mean distance of the hardest negative",
  "mining/hard_fraction": "Share of hard triplets",
  "mining/embedding_rank": "Effective rank of the embeddings",
  "mining/embedding_norm": "Mean norm of the embeddings",
  "train/learning_rate": "Learning rate",
  "train/images_per_second": "Images per second",
}


def points(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
  """Step and value of a metric, where it was logged and is finite.

  Args:
    rows: of `metrics.jsonl`.
    name: of the metric.
  """
  return plot.finite([(row["step"], row[name]) for row in rows if name in row])


def figures(rows_by_run: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
  """A figure a metric; empty if nothing was logged.

  Args:
    rows_by_run: rows of `metrics.jsonl` by the name of the run; one run needs none.
  """
  drawn = []
  for name, title in TITLES.items():
    series = [
      plot.Series(run if len(rows_by_run) > 1 else "", points(rows, name), color=i)
      for i, (run, rows) in enumerate(rows_by_run.items())
    ]
    series = [each for each in series if each.points]
    if series:
      both = [point for each in series for point in each.points]
      drawn.append(
        plot.figure(
          title,
          series,
          x_axis=axes.linear([x for x, _ in both]),
          y_axis=axes.linear([y for _, y in both], 3, is_rounded=True),
          x_name="step",
        )
      )
  return f'<div class="curves">{"".join(drawn)}</div>' if drawn else ""
