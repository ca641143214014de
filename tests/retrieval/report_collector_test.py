"""Report data of an evaluation: equal to loops, bounded, and read as written."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import UserError
from trainer.retrieval import report_collector
from trainer.retrieval.report_data import ReportData

_NAMES = ("ant", "bee", "cat", "dog")


def _items(num_items=80, num_classes=4, num_dimensions=8):
  random = np.random.default_rng(7)
  labels = random.integers(num_classes, size=num_items)
  centres = random.normal(size=(num_classes, num_dimensions))
  noise = random.normal(size=(num_items, num_dimensions))
  return (centres[labels] + noise).astype(np.float32), labels


def _nearest(embeddings):
  distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
  np.fill_diagonal(distances, np.inf)
  return np.argsort(distances, axis=1)[:, :-1]


def _pictures(items):
  """Returns a picture per item, with the item's number as grey value."""
  images = [np.full((8, 6, 1), item % 256, np.uint8) for item in items]
  return [tf.io.encode_png(image).numpy() for image in images]


def _collect(num_items=80, pictures_fn=_pictures, **options):
  embeddings, labels = _items(num_items)
  return report_collector.collect_report_data(
    embeddings,
    labels,
    _nearest(embeddings),
    np.arange(num_items),
    class_names=_NAMES,
    pictures_fn=pictures_fn,
    **options,
  )


@pytest.fixture(scope="module")
def report_data():
  return _collect()


def test_recall_at_every_k_equals_a_loop(report_data):
  embeddings, labels = _items()
  nearest = _nearest(embeddings)
  for k in (1, 2, 7, 79):
    hits = [
      any(labels[j] == labels[i] for j in nearest[i][:k]) for i in range(len(labels))
    ]
    assert report_data.recall_at[k - 1] == pytest.approx(sum(hits) / len(hits))
  assert len(report_data.recall_at) == 79


def test_confusions_equal_those_of_a_loop(report_data):
  embeddings, labels = _items()
  first = _nearest(embeddings)[:, 0]
  counts = {}
  for i, j in enumerate(first):
    if labels[i] != labels[j]:
      pair = (_NAMES[labels[i]], _NAMES[labels[j]])
      counts[pair] = counts.get(pair, 0) + 1
  found = {(c.class_name, c.taken_for): c.num_mistakes for c in report_data.confusions}
  assert found == counts
  numbers = [c.num_mistakes for c in report_data.confusions]
  assert numbers == sorted(numbers, reverse=True)
  assert report_data.num_mistakes == sum(counts.values())
  for confusion in report_data.confusions:
    assert first[confusion.query] == confusion.neighbour
    assert confusion.num_queries == (labels == _NAMES.index(confusion.class_name)).sum()


def test_query_of_each_confusion_is_shown_with_errors_first(report_data):
  shown = [query.item for query in report_data.queries]
  assert {confusion.query for confusion in report_data.confusions} <= set(shown)
  flags = [query.is_mistake for query in report_data.queries]
  assert flags == sorted(flags, reverse=True)
  assert any(flags) and not all(flags)
  assert len(set(shown)) == len(shown) == 24


def test_neighbours_have_class_distance_and_correctness(report_data):
  embeddings, labels = _items()
  nearest = _nearest(embeddings)
  for query in report_data.queries:
    assert [n.item for n in query.neighbours] == nearest[query.item][:8].tolist()
    for neighbour in query.neighbours:
      distance = np.linalg.norm(embeddings[query.item] - embeddings[neighbour.item])
      assert neighbour.distance == pytest.approx(distance, rel=1e-5)
      assert neighbour.is_right == (labels[query.item] == labels[neighbour.item])
      assert neighbour.class_name == _NAMES[labels[neighbour.item]]


def test_histogram_estimates_that_of_all_pairs(report_data):
  embeddings, labels = _items()
  by_kind = {True: [], False: []}
  for i in range(len(labels)):
    for j in range(i):
      by_kind[bool(labels[i] == labels[j])].append(
        np.linalg.norm(embeddings[i] - embeddings[j])
      )
  histogram = report_data.histogram
  for kind, counts in ((True, histogram.positive), (False, histogram.negative)):
    assert sum(counts) == 50_000
    edges = np.linspace(histogram.low, histogram.high, len(counts) + 1)
    expected, _ = np.histogram(by_kind[kind], edges)
    share = expected / len(by_kind[kind])
    # Five standard deviations of a sampled fraction.
    assert np.abs(np.array(counts) / 50_000 - share).max() < 5 * np.sqrt(0.1 / 50_000)
  assert histogram.positive_median == pytest.approx(np.median(by_kind[True]), rel=0.02)
  assert histogram.negative_median == pytest.approx(np.median(by_kind[False]), rel=0.02)


def test_map_has_each_item_once_with_class_and_correctness(report_data):
  embeddings, labels = _items()
  first = _nearest(embeddings)[:, 0]
  placed = report_data.embedding_map
  assert placed.method == "t-SNE"
  assert list(placed.items) == list(range(80))
  assert list(placed.class_names) == [_NAMES[label] for label in labels]
  assert list(placed.is_mistake) == (labels[first] != labels).tolist()
  for places in (placed.x, placed.y):
    assert min(places) >= 0 and max(places) <= 1


def test_sprite_has_the_pictures_in_the_order_of_the_items(report_data):
  placed = report_data.embedding_map
  content = tf.io.decode_base64(
    placed.sprite.picture.partition("base64,")[2]
    .replace("+", "-")
    .replace("/", "_")
    .rstrip("=")
  )
  image = tf.io.decode_image(content).numpy()
  assert image.shape[:2] == (placed.sprite.rows * 8, placed.sprite.columns * 6)
  for position, item in enumerate(placed.items):
    row, column = divmod(position, placed.sprite.columns)
    assert image[row * 8, column * 6, 0] == item


def test_every_shown_picture_exists(report_data):
  wanted = {str(q.item) for q in report_data.queries}
  wanted |= {str(n.item) for q in report_data.queries for n in q.neighbours}
  assert set(report_data.pictures) == wanted
  assert all(
    p.startswith("data:image/png;base64,") for p in report_data.pictures.values()
  )


def test_report_data_is_read_as_it_was_written(tmp_path, report_data):
  report_data.write(str(tmp_path))
  assert ReportData.read(str(tmp_path)) == report_data
  content = json.loads((tmp_path / "eval" / "report_data.json").read_text())
  assert content == json.loads(json.dumps(dataclasses.asdict(report_data)))
  assert [path.name for path in (tmp_path / "eval").iterdir()] == ["report_data.json"]


def test_run_without_report_data_returns_none(tmp_path):
  assert ReportData.read(str(tmp_path)) is None


def test_sample_depends_on_the_seed(report_data):
  assert _collect(seed=0) == report_data
  assert _collect(seed=1).queries != report_data.queries


def test_report_data_does_not_grow_with_the_gallery():
  num_items = 3000
  random = np.random.default_rng(1)
  labels = random.integers(1000, size=num_items)
  report_data = report_collector.collect_report_data(
    random.normal(size=(num_items, 2)).astype(np.float32),
    labels,
    random.integers(num_items, size=(num_items, 200)),
    np.arange(num_items),
    class_names={label: f"class {label}" for label in range(1000)},
  )
  assert len(report_data.embedding_map.items) == 1000
  assert len(report_data.queries) == 24
  assert len(report_data.confusions) == 12
  assert len(report_data.recall_at) == 100


def test_large_pictures_are_downsized():
  def photos(items):
    random = np.random.default_rng(0)
    shape = (90, 180, 3)
    images = [random.integers(256, size=shape).astype(np.uint8) for _ in items]
    return [tf.io.encode_png(image).numpy() for image in images]

  report_data = _collect(pictures_fn=photos)
  sprite = report_data.embedding_map.sprite
  assert (sprite.width, sprite.height) == (40, 20)
  picture = next(iter(report_data.pictures.values()))
  assert picture.startswith("data:image/jpeg;base64,")
  assert len(picture) < 4000


def test_non_image_inputs_have_no_pictures():
  report_data = _collect(pictures_fn=None)
  assert report_data.embedding_map.sprite is None
  assert report_data.pictures == {}


def test_small_galleries_use_principal_components_instead_of_t_sne():
  embeddings = np.array([[0, 0, 0], [4, 0, 0], [0, 1, 0], [4, 1, 0]], np.float32)
  report_data = report_collector.collect_report_data(
    embeddings,
    np.array([0, 1, 0, 1]),
    _nearest(embeddings),
    np.arange(4),
    class_names=_NAMES,
  )
  assert report_data.embedding_map.method == "PCA"
  # The axes have one scale: four units are four times as long as one.
  assert np.ptp(report_data.embedding_map.x) == pytest.approx(1.0)
  assert np.ptp(report_data.embedding_map.y) == pytest.approx(0.25)


def test_collapsed_embeddings_are_shown_collapsed():
  report_data = report_collector.collect_report_data(
    np.ones((20, 4), np.float32),
    np.arange(20) % 2,
    np.stack([np.delete(np.arange(20), i) for i in range(20)]),
    np.arange(20),
    class_names=_NAMES,
  )
  assert set(report_data.embedding_map.x) == {0.5}
  assert report_data.histogram.positive_median == 0.0


def test_query_alone_in_its_class_is_excluded():
  embeddings = np.array([[0.0], [1.0], [5.0]], np.float32)
  report_data = report_collector.collect_report_data(
    embeddings,
    np.array([0, 0, 1]),
    _nearest(embeddings),
    np.arange(3),
    class_names=_NAMES,
  )
  assert report_data.num_queries == 2
  assert report_data.recall_at[0] == 1.0
  assert report_data.confusions == []
  assert list(report_data.embedding_map.is_mistake) == [False, False, None]


def test_nonfinite_embeddings_are_counted_and_refused():
  embeddings, labels = _items()
  nearest = _nearest(embeddings)
  embeddings[3, 0] = np.nan
  embeddings[5] = np.inf
  with pytest.raises(UserError, match="2 of 80 embeddings are not finite"):
    report_collector.collect_report_data(
      embeddings, labels, nearest, np.arange(80), class_names=_NAMES
    )


def test_queries_without_any_relevant_item_are_refused():
  embeddings, _ = _items(4)
  with pytest.raises(UserError, match="at least one query must have a neighbour"):
    report_collector.collect_report_data(
      embeddings,
      np.arange(4),
      _nearest(embeddings),
      np.arange(4),
      class_names=_NAMES,
    )


def test_queries_without_neighbours_are_refused():
  embeddings, labels = _items()
  none = np.empty((80, 0), np.int64)
  with pytest.raises(UserError, match="80 queries with 0 neighbours"):
    report_collector.collect_report_data(
      embeddings, labels, none, np.arange(80), class_names=_NAMES
    )
