"""The names of what a training logs, known before one has run."""

_QUANTILES = ("p05", "p50", "p95")

LOGGED = (
  "train/loss",
  "train/learning_rate",
  "train/images_per_second",
  "train/seconds_per_step",
  "mining/active_fraction",
  "mining/anchors_without_positive",
  "mining/duplicate_fraction",
  "mining/easy_fraction",
  "mining/semi_hard_fraction",
  "mining/hard_fraction",
  "mining/margin_violations",
  "mining/hardest_positive_distance",
  "mining/hardest_negative_distance",
  *(f"mining/positive_distance_{each}" for each in _QUANTILES),
  *(f"mining/negative_distance_{each}" for each in _QUANTILES),
  "mining/embedding_norm",
  "mining/embedding_norm_std",
  "mining/embedding_spread",
  "mining/embedding_rank",
)
