"""Sources of listed and packed items: their items and refused inputs."""

from __future__ import annotations

import importlib.util
import io

import lmdb
import numpy as np
import pytest
import tensorflow as tf

from trainer.cli.ingest import ingest
from trainer.data import ingestion
from trainer.data.example_encoder import ExampleEncoder
from trainer.data.records import RecordIndex
from trainer.data.sources.image_folders import ImageFolderSource
from trainer.data.sources.image_lists import ManifestSource
from trainer.data.sources.source import Item, encode_png
from trainer.data.sources.tables import LmdbSource, ParquetSource, TfRecordSource
from trainer.errors import UserError


def _image(number):
  return np.random.default_rng(number).integers(0, 256, (5, 4)).astype(np.uint8)


@pytest.fixture
def listed(tmp_path):
  """Three images and a list of them with an additional column of each type."""
  for number in range(3):
    (tmp_path / f"bild {number}.png").write_bytes(encode_png(_image(number)))
  (tmp_path / "list.csv").write_text(
    "path,label,title,year,price\n"
    'bild 0.png,"a, b","Käse ""Brot""",1999,1.5\n'
    "./bild 1.png,ö,two,2000,2\n"
    "bild 2.png,ö,,2001,-1e3\n",
    encoding="utf-8",
  )
  return tmp_path


def _manifest(folder, **options):
  options = {"number_columns": {"year": "int", "price": "float"}, **options}
  return ManifestSource(path=str(folder / "list.csv"), **options)


def test_additional_columns_become_features(listed):
  items = list(_manifest(listed).items())
  assert [item.label for item in items] == ["a, b", "ö", "ö"]
  assert [item.key for item in items] == [f"bild {n}.png" for n in range(3)]
  assert items[0].features == {"title": 'Käse "Brot"', "year": 1999, "price": 1.5}
  assert items[2].features == {"title": "", "year": 2001, "price": -1000.0}
  assert items[1].image == encode_png(_image(1))


def test_features_of_a_manifest_are_in_the_records(listed):
  ingest(source=_manifest(listed), folder=str(listed / "records"))
  [record] = RecordIndex.open(str(listed / "records")).read([0])
  features = tf.train.Example.FromString(record).features.feature
  assert features["title"].bytes_list.value[0].decode() == 'Käse "Brot"'
  assert features["year"].int64_list.value == [1999]
  assert features["price"].float_list.value == [1.5]


def test_tsv_of_texts_needs_no_images(tmp_path):
  (tmp_path / "texts.tsv").write_text("label\ttext\nx\tone, two\ny\tthree\n")
  source = ManifestSource(path=str(tmp_path / "texts.tsv"), path_column=None)
  items = list(source.items())
  assert items[0] == Item("texts.tsv:2", "x", None, {"text": "one, two"})


@pytest.mark.parametrize("path", ["../out.png", "/etc/passwd", "a/../../b", "", ".."])
def test_a_path_outside_the_folder_is_refused(listed, path):
  with open(listed / "list.csv", "a", encoding="utf-8") as file:
    file.write(f"{path},ö,t,1,1\n")
  with pytest.raises(UserError, match=r"list\.csv: line 5 has the path .* not inside"):
    _manifest(listed).check()


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ("bild 0.png,,t,1,1", "line 5 has no label in column 'label'"),
    ("bild 0.png,a", "line 5 has . fields, but"),
    ("bild 0.png,a,t,1,1,1", "line 5 has . fields, but"),
    ("bild 0.png,a,t,x,1", "line 5 has 'x' in column 'year', which is not of type int"),
    ("gone.png,a,t,1,1", "gone.png can't be read: No such file"),
    ('bild 0.png,"a"b,t,1,1', "after line 4: "),
  ],
)
def test_a_damaged_row_is_named(listed, row, message):
  with open(listed / "list.csv", "a", encoding="utf-8") as file:
    file.write(row + "\n")
  with pytest.raises(UserError, match=message):
    list(_manifest(listed).items())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"label_column": "class"},
      r"has no column 'class': .* has 'path', 'label', 'title'",
    ),
    ({"number_columns": {"year": "date"}}, "'date' must be 'int'"),
  ],
)
def test_missing_columns_are_refused(listed, options, message):
  with pytest.raises(UserError, match=message):
    list(_manifest(listed, **options).loaders())


def test_binary_manifest_is_named(listed):
  (listed / "list.csv").write_bytes(b"path,label\n\xff,\xfe\n")
  with pytest.raises(UserError, match=r"list\.csv is not UTF-8 \(byte 11\)"):
    list(_manifest(listed, number_columns={}).loaders())


def test_a_link_to_itself_is_named(tmp_path):
  for name in "ab":
    (tmp_path / name).mkdir()
    (tmp_path / name / "0.png").write_bytes(encode_png(_image(0)))
  (tmp_path / "b" / "1.png").symlink_to("1.png")
  with pytest.raises(UserError, match=r"b/1\.png can't be read: Too many levels"):
    ImageFolderSource(folder=str(tmp_path)).check()


def test_class_folder_linked_to_its_parent_terminates(tmp_path):
  for name in "ab":
    (tmp_path / name).mkdir()
    (tmp_path / name / "0.png").write_bytes(encode_png(_image(0)))
    (tmp_path / name / "up").symlink_to(tmp_path)
  (tmp_path / "loop").symlink_to(tmp_path)
  source = ImageFolderSource(folder=str(tmp_path))
  assert [item.key for item in source.items()] == ["a/0.png", "b/0.png"]


def _parquet(folder):
  import pyarrow
  from pyarrow import parquet

  table = {
    "image": [encode_png(_image(n)) for n in range(3)],
    "label": ["x", "y", "ü"],
    "year": [1, 2, 3],
    "note": ["a", "", "c"],
  }
  parquet.write_table(pyarrow.table(table), folder / "rows.parquet")
  return folder / "rows.parquet"


def test_rows_of_parquet_become_items(tmp_path):
  items = list(ParquetSource(pattern=str(_parquet(tmp_path))).items())
  assert [item.label for item in items] == ["x", "y", "ü"]
  assert items[2].image == encode_png(_image(2))
  assert items[2].features == {"year": 3, "note": b"c"}
  assert items[2].key == "rows.parquet/2"


def test_missing_column_is_named(tmp_path):
  source = ParquetSource(pattern=str(_parquet(tmp_path)), label_column="class")
  with pytest.raises(UserError, match="has no column 'class'; it has"):
    list(source.loaders())


def test_truncated_parquet_file_is_named(tmp_path):
  path = _parquet(tmp_path)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match=r"rows\.parquet can't be read"):
    list(ParquetSource(pattern=str(path)).loaders())


def _lmdb(folder):
  environment = lmdb.open(str(folder / "db"), map_size=1 << 20)
  with environment.begin(write=True) as transaction:
    for number in range(3):
      key = f"class {number % 2}/{number}".encode()
      transaction.put(key, encode_png(_image(number)))
  environment.close()
  return str(folder / "db")


def test_entries_of_lmdb_become_items(tmp_path):
  items = list(LmdbSource(path=_lmdb(tmp_path)).items())
  assert [item.key for item in items] == ["class 0/0", "class 0/2", "class 1/1"]
  assert [item.label for item in items] == ["class 0", "class 0", "class 1"]
  assert items[1].image == encode_png(_image(2))


def test_a_key_without_a_class_is_named(tmp_path):
  source = LmdbSource(path=_lmdb(tmp_path), label_pattern="^(x)")
  with pytest.raises(UserError, match="finds no class in the key 'class 0/0'"):
    list(source.items())


def test_missing_reader_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  parquet_source = ParquetSource(pattern=str(_parquet(tmp_path)))
  with pytest.raises(UserError, match="Parquet files need pyarrow; install it: pip"):
    list(parquet_source.loaders())
  with pytest.raises(UserError, match="LMDB files need lmdb; install it: pip"):
    list(LmdbSource(path=str(tmp_path)).loaders())


def _records(folder):
  items = [
    Item(f"k{n}", f"c{n % 2}", encode_png(_image(n)), {"n": n, "v": [1.5, n]})
    for n in range(4)
  ]
  ingestion.write_records(items, str(folder), records_per_shard=3, fingerprint={})
  return str(folder / "*.tfrecord")


def test_tfrecords_can_be_ingested(tmp_path):
  source = TfRecordSource(pattern=_records(tmp_path), features=("n", "v"))
  items = list(source.items())
  assert [item.label for item in items] == ["c0", "c1", "c0", "c1"]
  assert items[3].key == "records-00001.tfrecord/0"
  assert items[3].image == encode_png(_image(3))
  found = {name: values.tolist() for name, values in items[3].features.items()}
  assert found == {"n": [3], "v": [1.5, 3.0]}


def test_damage_in_a_tfrecord_is_named(tmp_path):
  pattern = _records(tmp_path)
  path = tmp_path / "records-00000.tfrecord"
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(
    UserError, match=r"records-00000\.tfrecord: record 2 is truncated"
  ):
    list(TfRecordSource(pattern=pattern).loaders())


def test_missing_feature_is_named(tmp_path):
  source = TfRecordSource(pattern=_records(tmp_path), image_feature="jpg")
  with pytest.raises(UserError, match="has no feature 'jpg'; it has"):
    list(source.items())


def test_a_pattern_without_files_is_named(tmp_path):
  with pytest.raises(UserError, match="matches no file"):
    TfRecordSource(pattern=str(tmp_path / "*.tfrecord")).fingerprint()


def test_webp_and_the_other_formats_are_ingested_from_folders(tmp_path):
  from PIL import Image

  for number, ending in enumerate(("png", "jpeg", "gif", "bmp", "webp")):
    (tmp_path / "images" / f"c{number}").mkdir(parents=True)
    file = io.BytesIO()
    Image.fromarray(_image(number)).save(file, ending)
    (tmp_path / "images" / f"c{number}" / f"0.{ending}").write_bytes(file.getvalue())
  source = ImageFolderSource(folder=str(tmp_path / "images"))
  ingest(source=source, folder=str(tmp_path / "records"))
  assert RecordIndex.open(str(tmp_path / "records")).num_records == 5


def test_a_broken_link_among_the_files_of_a_pattern_is_named(tmp_path):
  (tmp_path / "a.tfrecord").symlink_to(tmp_path / "gone")
  with pytest.raises(UserError, match=r"a\.tfrecord can't be read: No such file"):
    TfRecordSource(pattern=str(tmp_path / "*.tfrecord")).fingerprint()


def test_tfrecord_label_that_is_not_utf8_is_named(tmp_path):
  feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"\xff"]))
  example = tf.train.Example(features=tf.train.Features(feature={"label": feature}))
  with tf.io.TFRecordWriter(str(tmp_path / "a")) as file:
    file.write(example.SerializeToString())
  source = TfRecordSource(pattern=str(tmp_path / "a"), image_feature=None)
  with pytest.raises(UserError, match=r"a/0 has a label b'\\xff' that is not UTF-8"):
    list(source.items())


def test_folder_is_refused_as_a_parquet_file(tmp_path):
  (tmp_path / "a.parquet").mkdir()
  with pytest.raises(UserError, match=r"a\.parquet can't be read: Is a directory"):
    list(ParquetSource(pattern=str(tmp_path / "*.parquet")).loaders())


@pytest.mark.parametrize(
  ("pattern", "message"),
  [("(a", "is not a regular expression"), ("^a/", "has no group")],
)
def test_invalid_label_pattern_is_refused(pattern, message):
  with pytest.raises(UserError, match=rf"LmdbSource\.label_pattern=.* {message}"):
    LmdbSource(path="a", label_pattern=pattern)


def test_a_path_with_a_nul_is_refused(tmp_path):
  (tmp_path / "list.csv").write_text("path,label\na.png,x\n")
  source = ManifestSource(path=str(tmp_path / "list.csv"))
  with pytest.raises(UserError, match=r"has the path 'a\\x00b', which is not inside"):
    source._inside("a\0b", "line 2")


def test_fingerprint_depends_on_the_image_folder(listed):
  path = str(listed / "list.csv")
  there = ManifestSource(path=path, folder=str(listed / "elsewhere"))
  assert there.fingerprint() != ManifestSource(path=path).fingerprint()


def test_rows_of_a_list_are_counted(listed):
  path = listed / "list.csv"
  path.write_text(path.read_text() + "\n")  # An empty line is not a row.
  assert _manifest(listed).num_items() == len(list(_manifest(listed).loaders())) == 3


def test_damaged_list_is_not_counted(listed):
  path = listed / "list.csv"
  path.write_text(path.read_text() + 'a,"b')
  assert _manifest(listed).num_items() is None


def test_rows_of_parquet_are_counted(tmp_path):
  assert ParquetSource(pattern=str(_parquet(tmp_path))).num_items() == 3


def test_records_are_not_counted_before_they_are_read(tmp_path):
  assert TfRecordSource(pattern=str(tmp_path / "*")).num_items() is None


def _tfrecords(folder, *records):
  kinds = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
  with tf.io.TFRecordWriter(str(folder / "a.tfrecord")) as file:
    for record in records:
      example = tf.train.Example()
      for name, (kind, values) in record.items():
        getattr(example.features.feature[name], kinds[kind]).value.extend(values)
      file.write(example.SerializeToString())
  return str(folder / "a.tfrecord")


def test_ingested_tfrecord_features_keep_type_and_values(tmp_path):
  further = {
    "none": (int, []),
    "no text": (bytes, []),
    "texts": (bytes, [b"a\0", b""]),
    "wide": (int, [2**63 - 1, -(2**63)]),
    "vector": (float, [0.5, 1.5]),
  }
  pattern = _tfrecords(tmp_path, {"label": (bytes, [b"c"]), **further})
  source = TfRecordSource(pattern=pattern, image_feature=None, features=list(further))
  record = ExampleEncoder(max_pixels=1)(next(source.items())).data
  found = tf.train.Example.FromString(record).features.feature
  given = next(iter(tf.data.TFRecordDataset(pattern))).numpy()
  expected = tf.train.Example.FromString(given).features.feature
  assert {n: str(found[n]) for n in further} == {n: str(expected[n]) for n in further}


@pytest.mark.parametrize(
  ("label", "message"),
  [
    ((bytes, []), "a.tfrecord/0 has 0 values in 'label'"),
    ((int, [1, 2]), "a.tfrecord/0 has 2 values in 'label'"),
    ((bytes, [b""]), "a.tfrecord/0 has no label"),
    ((float, [float("nan")]), "a.tfrecord/0 has no label"),
    ((float, [0.5]), r"a.tfrecord/0 has the label 0\.5; it must be text or an integer"),
  ],
)
def test_tfrecord_without_exactly_one_label_is_refused(tmp_path, label, message):
  pattern = _tfrecords(tmp_path, {"label": label, "x": (int, [1])})
  source = TfRecordSource(pattern=pattern, image_feature=None, features=["x"])
  with pytest.raises(UserError, match=message):
    list(source.items())


def test_tfrecords_of_equal_names_in_two_folders_have_different_keys(tmp_path):
  for part in ("a", "b"):
    (tmp_path / part).mkdir()
    _tfrecords(tmp_path / part, {"label": (int, [1]), "x": (int, [1])})
  pattern = str(tmp_path / "*" / "a.tfrecord")
  source = TfRecordSource(pattern=pattern, image_feature=None, features=["x"])
  assert [i.key for i in source.items()] == ["a/a.tfrecord/0", "b/a.tfrecord/0"]


def test_lmdb_key_that_is_not_utf8_is_refused(tmp_path):
  environment = lmdb.open(str(tmp_path / "db"), map_size=1 << 20)
  with environment.begin(write=True) as transaction:
    transaction.put(b"\xff/1", encode_png(_image(0)))
  environment.close()
  with pytest.raises(
    UserError, match=r"the key .* has a label b'\\xff' that is not UTF"
  ):
    list(LmdbSource(path=str(tmp_path / "db")).items())


def test_lmdb_larger_than_a_batch_is_read_whole(tmp_path):
  environment = lmdb.open(str(tmp_path / "db"), map_size=1 << 25)
  values = {f"c{n}/{n}": bytes([n]) * (1 << 20) for n in range(9)}
  with environment.begin(write=True) as transaction:
    for key, value in values.items():
      transaction.put(key.encode(), value)
  environment.close()
  items = LmdbSource(path=str(tmp_path / "db")).items()
  assert {item.key: item.image for item in items} == values


def test_file_that_is_not_an_lmdb_is_named(tmp_path):
  (tmp_path / "data.mdb").write_bytes(b"no LMDB" * 2000)
  with pytest.raises(UserError, match=r"data\.mdb can't be read as LMDB: .*"):
    list(LmdbSource(path=str(tmp_path)).items())
