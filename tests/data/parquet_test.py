"""Columns of Parquet files: each row keeps its values or is refused by name."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from pyarrow import parquet

from trainer.cli.ingest import ingest
from trainer.data.example_encoder import ExampleEncoder
from trainer.data.records import RecordIndex
from trainer.data.sources.source import encode_png
from trainer.data.sources.tables import ParquetSource
from trainer.errors import UserError

_NUM_ROWS = 12
_LABELS = [f"c{n // 3}" for n in range(_NUM_ROWS)]


def _image(number):
  return encode_png(np.full((4, 4), 10 * number, np.uint8))


def _source(folder, name="rows.parquet", *, options=None, writing=None, **columns):
  """Returns a source of twelve rows with label, image and the given columns."""
  table = {"label": _LABELS, "image": [_image(n) for n in range(_NUM_ROWS)], **columns}
  path = folder / name
  path.parent.mkdir(exist_ok=True)
  parquet.write_table(pa.table(table), path, **(writing or {}))
  return ParquetSource(pattern=str(path), **(options or {}))


def _features(source):
  """Returns features of each record other than image, label and key, as lists."""
  rows = []
  for number, item in enumerate(source.items()):
    record = ExampleEncoder(max_pixels=100)(item)
    found = tf.train.Example.FromString(record.data).features.feature
    assert (item.label, item.image) == (_LABELS[number], _image(number))
    further = {name: f for name, f in found.items() if name not in _RESERVED}
    rows.append({name: _values(feature) for name, feature in further.items()})
  assert len(rows) == _NUM_ROWS
  return rows


_RESERVED = ("image", "label", "key")


def _values(feature):
  kind = feature.WhichOneof("kind")
  return list(getattr(feature, kind).value)


_SCALARS = {
  "integers": (pa.int64(), lambda n: n - 5),
  "small integers": (pa.uint8(), lambda n: n),
  "floats": (pa.float32(), lambda n: n + 0.5),
  "half floats": (pa.float16(), lambda n: np.float16(n + 0.5)),
  "text": (pa.string(), lambda n: f"ö{n}"),
  "large text": (pa.large_string(), lambda n: f"{n}"),
  "bytes": (pa.binary(), lambda n: bytes([0, n, 0])),
  "bytes of fixed size": (pa.binary(3), lambda n: bytes([0, n, 0])),
  "Booleans": (pa.bool_(), lambda n: n % 3 == 0),
}


@pytest.mark.parametrize("name", _SCALARS)
def test_null_is_omitted_without_shifting_rows(tmp_path, name):
  type_, value_fn = _SCALARS[name]
  given = [None if n % 4 == 1 else value_fn(n) for n in range(_NUM_ROWS)]
  rows = _features(_source(tmp_path, x=pa.array(given, type_)))
  for value, row in zip(given, rows):
    expected = value.encode() if isinstance(value, str) else value
    assert row == ({} if value is None else {"x": [expected]})


_LISTS = {
  "integers": (pa.int64(), lambda n: [n * 100 + j for j in range(n % 3)]),
  "large integers": (pa.int64(), lambda n: [2**62 + n]),
  "floats": (pa.float32(), lambda n: [n, 0.5]),
  "Booleans": (pa.bool_(), lambda n: [n % 2 == 0, True]),
  "text": (pa.string(), lambda n: [f"ö{j}" for j in range(n % 3)]),
  "bytes": (pa.binary(), lambda n: [bytes([n, 0])] * (n % 2)),
  "categories": (pa.dictionary(pa.int8(), pa.string()), lambda n: ["a", f"b{n % 2}"]),
}


@pytest.mark.parametrize("name", _LISTS)
def test_lists_are_read_whole_and_null_lists_omitted(tmp_path, name):
  type_, value_fn = _LISTS[name]
  given = [None if n == 5 else value_fn(n) for n in range(_NUM_ROWS)]
  rows = _features(_source(tmp_path, x=pa.array(given, pa.list_(type_))))
  for values, row in zip(given, rows):
    assert ("x" in row) == (values is not None)
    expected = [v.encode() if isinstance(v, str) else v for v in values or ()]
    assert row.get("x", []) == expected


def test_an_empty_list_keeps_the_type_of_its_column(tmp_path):
  given = pa.array([[n] * (n % 2) for n in range(_NUM_ROWS)], pa.list_(pa.int32()))
  texts = pa.array([["a"] * (n % 2) for n in range(_NUM_ROWS)])
  first, *_ = _source(tmp_path, x=given, t=texts).items()
  record = ExampleEncoder(max_pixels=100)(first).data
  found = tf.train.Example.FromString(record).features.feature
  assert found["x"].WhichOneof("kind") == "int64_list"
  assert found["t"].WhichOneof("kind") == "bytes_list"


@pytest.mark.parametrize("row_group_size", [5, 12])
def test_vectors_of_fixed_size_are_read_whole(tmp_path, row_group_size):
  given = np.random.default_rng(0).normal(size=(_NUM_ROWS, 4)).astype(np.float32)
  column = pa.FixedSizeListArray.from_arrays(pa.array(given.ravel()), 4)
  source = _source(tmp_path, x=column, writing={"row_group_size": row_group_size})
  np.testing.assert_array_equal([row["x"] for row in _features(source)], given)


def test_nested_lists_are_flattened_in_row_major_order(tmp_path):
  given = [[[n, 1, 2], [3, 4, 5]] for n in range(_NUM_ROWS)]
  rows = _features(_source(tmp_path, x=pa.array(given)))
  assert [row["x"] for row in rows] == [[n, 1, 2, 3, 4, 5] for n in range(_NUM_ROWS)]


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ([[1], [2, 3]], r"rows.parquet/2 has lists of lengths \[1, 2\] inside column 'x'"),
    ([[1, 2], None], "rows.parquet/2 has a null inside the list of column 'x'"),
    ([[1, 2], [3, None]], "rows.parquet/2 has a null inside the list of column 'x'"),
  ],
)
def test_list_with_nulls_is_refused_with_row_and_column(tmp_path, bad, message):
  given = [bad if n == 2 else [[1, 2], [3, 4]] for n in range(_NUM_ROWS)]
  source = _source(tmp_path, x=pa.array(given))
  with pytest.raises(UserError, match=message):
    list(source.items())
  no_column = ParquetSource(pattern=str(tmp_path / "*"), columns=())
  assert [item.features for item in no_column.items()] == [{}] * _NUM_ROWS


def test_a_list_of_only_nulls_is_refused(tmp_path):
  source = _source(tmp_path, x=pa.array([[None]] * _NUM_ROWS))
  with pytest.raises(UserError, match="a null inside the list of column 'x'"):
    list(source.items())


def test_dates_times_and_decimal_numbers_become_text(tmp_path):
  day, time = datetime.date(2020, 2, 3), datetime.datetime(2020, 2, 3, 4, 5, 6)
  source = _source(
    tmp_path,
    day=[day] * _NUM_ROWS,
    time=pa.array([time] * _NUM_ROWS, pa.timestamp("ms")),
    price=[decimal.Decimal("12.50")] * _NUM_ROWS,
    wait=pa.array([datetime.timedelta(seconds=2)] * _NUM_ROWS, pa.duration("ms")),
  )
  expected = {"day": [b"2020-02-03"], "time": [b"2020-02-03 04:05:06.000"]}
  expected.update(price=[b"12.50"], wait=[2000])
  assert _features(source) == [expected] * _NUM_ROWS


def test_struct_fields_are_columns_with_dotted_names(tmp_path):
  images = [
    None if n == 2 else {"bytes": _image(n), "path": f"{n}.png"} for n in range(3)
  ]
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.table({"image": images, "label": ["a", "b", "c"]}), path)
  first, second, third = ParquetSource(
    pattern=str(path), image_column="image.bytes"
  ).loaders()
  assert first().image == _image(0)
  assert second().features == {"image.path": b"1.png"}
  with pytest.raises(
    UserError, match=r"a\.parquet/2 has no image: column 'image\.bytes'"
  ):
    third()
  with pytest.raises(UserError, match=r"no column 'image'; it has image\.bytes, "):
    list(ParquetSource(pattern=str(path)).loaders())


def test_columns_named_like_features_of_every_record_are_renamed(tmp_path):
  source = _source(tmp_path, key=[f"k{n}" for n in range(_NUM_ROWS)])
  rows = _features(source)
  assert rows[3] == {"key_column": [b"k3"]}


@pytest.mark.parametrize(
  "column",
  [
    pa.array([[("a", 1)]] * 12, pa.map_(pa.string(), pa.int64())),
    pa.array([[{"a": 1}]] * 12),
  ],
)
def test_column_of_an_unsupported_type_is_refused(tmp_path, column):
  source = _source(tmp_path, x=column)
  with pytest.raises(UserError, match=r"column 'x' is of type .*, which records can't"):
    list(source.loaders())
  kept = ParquetSource(pattern=str(tmp_path / "*"), columns=())
  assert len(list(kept.items())) == _NUM_ROWS


def test_only_the_selected_columns_are_kept(tmp_path):
  source = _source(tmp_path, a=[1] * 12, b=[2] * 12, options={"columns": ["b"]})
  assert _features(source) == [{"b": [2]}] * _NUM_ROWS
  missing = ParquetSource(pattern=str(tmp_path / "*"), columns=["c"])
  with pytest.raises(UserError, match="has no column 'c'; it has label, image, a, b"):
    list(missing.loaders())


@pytest.mark.parametrize(
  ("column", "message"),
  [
    ({"label": [[1]] * 12}, "label column 'label' is of type list"),
    ({"image": ["a.png"] * 12}, "image column 'image' is of type string; it must be b"),
    ({"label": [0.5] * 12}, "rows.parquet/0 has the label 0.5; it must be text or an"),
    ({"label": [float("nan")] * 12}, "rows.parquet/0 has no label"),
    ({"label": [""] * 12}, "rows.parquet/0 has no label"),
    ({"label": [b"\xff"] * 12}, "rows.parquet/0 has a label .* not UTF-8"),
    ({"x": pa.array([2**64 - 1] * 12, pa.uint64())}, "integers in records are at most"),
    ({"x": [123456789.0] * 12}, "has 123456789.0 in the feature 'x'"),
    ({"x": [1e300] * 12}, r"has 1e\+300 in the feature 'x'"),
  ],
)
def test_lossy_value_is_refused(tmp_path, column, message):
  with pytest.raises(UserError, match=message):
    _features(_source(tmp_path, **column))


def test_integers_that_became_floats_are_the_same_classes(tmp_path):
  source = _source(tmp_path, label=[float(n // 3) for n in range(_NUM_ROWS)])
  assert [item.label for item in source.items()] == [str(n // 3) for n in range(12)]


@pytest.mark.parametrize("column", ["label", "image"])
def test_rows_without_label_or_image_are_refused_or_skipped(tmp_path, column):
  values = _LABELS if column == "label" else [_image(n) for n in range(_NUM_ROWS)]
  holed = [None if n in (1, 7) else values[n] for n in range(_NUM_ROWS)]
  source = _source(tmp_path / "in", **{column: holed})
  with pytest.raises(UserError, match=rf"rows\.parquet/1 has no {column}: column"):
    ingest(source=source, folder=str(tmp_path / "refused"))
  ingest(source=source, folder=str(tmp_path / "out"), unreadable="leave_out")
  index = RecordIndex.open(str(tmp_path / "out"))
  kept = [n for n in range(_NUM_ROWS) if n not in (1, 7)]
  assert [index.class_names[n] for n in index.labels] == [_LABELS[n] for n in kept]
  for number, record in zip(kept, index.read(range(len(kept)))):
    found = tf.train.Example.FromString(record).features.feature
    assert found["image"].bytes_list.value[0] == _image(number)


def test_files_of_equal_names_in_two_folders_have_different_keys(tmp_path):
  for part in ("a", "b"):
    _source(tmp_path / part)
  source = ParquetSource(pattern=str(tmp_path / "*" / "rows.parquet"))
  keys = [item.key for item in source.items()]
  assert (keys[0], keys[12]) == ("a/rows.parquet/0", "b/rows.parquet/0")
  assert len(set(keys)) == source.num_items() == 2 * _NUM_ROWS


def test_column_whose_type_differs_between_files_is_refused(tmp_path):
  _source(tmp_path, "a.parquet", x=[1] * 12, y=pa.nulls(12))
  _source(tmp_path, "b.parquet", x=[None] * 11 + [2.5], y=[3] * 12)
  source = ParquetSource(pattern=str(tmp_path / "*.parquet"))
  with pytest.raises(UserError, match=r"b\.parquet has column 'x' as float, .* as int"):
    list(source.loaders())
  no_x = ParquetSource(pattern=str(tmp_path / "*.parquet"), columns=["y"])
  assert [item.features for item in no_x.items()] == [{}] * 12 + [{"y": 3}] * 12


def test_two_columns_of_one_name_are_refused(tmp_path):
  table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["label", "label"])
  parquet.write_table(table, tmp_path / "a.parquet")
  source = ParquetSource(pattern=str(tmp_path / "a.parquet"), image_column=None)
  with pytest.raises(UserError, match="has two columns called 'label'; rename one"):
    list(source.loaders())


@pytest.mark.parametrize(
  "writing",
  [
    {"use_dictionary": False, "column_encoding": {"x": "DELTA_BINARY_PACKED"}},
    {"data_page_version": "2.0", "compression": "zstd"},
    {"compression": "brotli", "row_group_size": 5},
  ],
)
def test_every_encoding_and_compression_gives_the_same_rows(tmp_path, writing):
  rows = _features(_source(tmp_path, x=list(range(_NUM_ROWS)), writing=writing))
  assert rows == [{"x": [n]} for n in range(_NUM_ROWS)]


def test_a_file_without_rows_has_no_items(tmp_path):
  empty = pa.table({"label": pa.array([], pa.string()), "image": pa.nulls(0)})
  parquet.write_table(
    empty.set_column(1, "image", pa.array([], pa.binary())), tmp_path / "a"
  )
  source = ParquetSource(pattern=str(tmp_path / "a"))
  assert list(source.items()) == []
  assert source.num_items() == 0
