"""Lists written by spreadsheets, pandas and labelling tools, read or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from trainer.cli.ingest import ingest
from trainer.data import ingestion
from trainer.data.csv_file import CsvFile
from trainer.data.records import RecordIndex, record_names
from trainer.data.sources.image_lists import ManifestSource
from trainer.data.sources.source import Item, encode_png
from trainer.data.triplet_sampler import read_triplets
from trainer.errors import UserError

_ROWS = [("im/0.png", "a"), ("im/1.png", "b")]


def _image(value):
  return encode_png(np.full((2, 2), value, np.uint8))


@pytest.fixture
def images(tmp_path):
  """Three images in a folder next to the list."""
  (tmp_path / "im").mkdir()
  for number in range(3):
    (tmp_path / "im" / f"{number}.png").write_bytes(_image(number))
  return tmp_path


def _write(folder, text, name="list.csv", encoding="utf-8"):
  path = folder / name
  path.write_bytes(text.encode(encoding))
  return str(path)


def _items(where, text, name="list.csv", encoding="utf-8", **options):
  source = ManifestSource(path=_write(where, text, name, encoding), **options)
  return list(source.items())


def _names(items):
  return [(item.key, item.label) for item in items]


def _ingested(folder, text, *, unreadable="refuse", **options):
  source = ManifestSource(path=_write(folder, text), **options)
  ingest(source=source, folder=str(folder / "records"), unreadable=unreadable)
  return RecordIndex.open(str(folder / "records"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_every_separator_encoding_and_line_end_is_read(
  images, separator, line_end, encoding
):
  rows = [("path", "label", "text"), *((*row, "é日") for row in _ROWS)]
  text = line_end.join(separator.join(row) for row in rows) + line_end
  items = _items(images, text, encoding=encoding)
  assert _names(items) == _ROWS
  assert items[0].features == {"text": "é日"}
  assert items[1].image == _image(1)


def test_an_unexpected_separator_is_logged(images, caplog):
  _items(images, "path;label\nim/0.png;a\n")
  assert "list.csv is read with semicolons as separators" in caplog.text


@pytest.mark.parametrize("name", ["list.tsv", "list.TSV", "list.tab"])
def test_commas_in_cells_of_a_tsv_are_kept(images, name, caplog):
  text = "path\tlabel\ttext\nim/0.png\ta\tx, y\n"
  [item] = _items(images, text, name=name)
  assert item.features == {"text": "x, y"}
  assert not caplog.text


def test_excel_separator_line_is_used(images):
  text = "sep=;\r\npath;label\r\nim/0.png;a\r\nim/1.png\r\n"
  source = ManifestSource(path=_write(images, text))
  assert source.num_items() == 2
  with pytest.raises(UserError, match=r"line 4 has . fields, but"):
    source.check()


def test_utf16_without_a_byte_order_mark_is_refused(images):
  with pytest.raises(UserError, match="zero bytes, as UTF-16 without"):
    _items(images, "path,label\nim/0.png,a\n", encoding="utf-16-le")


def test_text_truncated_within_a_character_is_refused(images):
  text = "path\tlabel\nim/0.png\ta\n".encode("utf-16")[:-1]
  (images / "list.tsv").write_bytes(text)
  with pytest.raises(UserError, match="is not UTF-16"):
    list(ManifestSource(path=str(images / "list.tsv")).loaders())


@pytest.mark.parametrize("content", ["", "\n", "\ufeff"])
def test_an_empty_list_is_refused(images, content):
  with pytest.raises(UserError, match="its first row must name the columns; it has"):
    _items(images, content)


def test_missing_header_row_is_reported(images):
  with pytest.raises(UserError, match=r"must name the columns; it has 'im/0.png', 'a'"):
    _items(images, "im/0.png,a\nim/1.png,b\n")


def test_two_columns_of_one_name_are_refused(images):
  with pytest.raises(UserError, match="two columns called 'x'; rename one"):
    _items(images, "path,label,x, x\nim/0.png,a,1,2\n")


def test_rows_with_only_separators_are_skipped(images):
  text = "path,label\nim/0.png,a\n,\n\nim/1.png,b\n,\n"
  assert _names(_items(images, text)) == _ROWS
  assert ManifestSource(path=_write(images, text)).num_items() == 2


def test_unnamed_columns_are_skipped_with_a_warning(images, caplog):
  text = ",path,label,\n0,im/0.png,a,\n1,im/1.png,b,\n"
  items = _items(images, text)
  assert _names(items) == _ROWS
  assert items[0].features == {}
  assert "2 columns without a name are skipped" in caplog.text


def test_spaces_after_separators_are_stripped(images, caplog):
  [item] = _items(images, 'path, label, text\nim/0.png, "a, b", t\n')
  assert (item.label, item.features) == ("a, b", {"text": "t"})
  assert "blanks after separators are removed" in caplog.text


def test_spaces_around_labels_and_paths_are_stripped(images, caplog):
  text = "path,label,text\nim/0.png ,a, x \n im/1.png,b \nim/2.png,b,\n"
  text = text.replace("b \n", "b ,\n")
  items = _items(images, text)
  assert _names(items) == [*_ROWS, ("im/2.png", "b")]
  assert items[0].features == {"text": " x "}
  assert "3 paths or labels have surrounding blanks" in caplog.text


@pytest.mark.parametrize("folder", [None, "im"])
def test_absolute_paths_inside_the_folder_are_read(images, folder):
  options = {} if folder is None else {"folder": str(images / folder)}
  text = f"path,label\n{images}/im/0.png,a\n{images}//im/../im/1.png,b\n"
  items = _items(images, text, **options)
  start = "im/" if folder is None else ""
  assert [item.key for item in items] == [f"{start}0.png", f"{start}1.png"]
  assert items[1].image == _image(1)


def test_absolute_paths_through_a_link_to_the_folder_are_read(images):
  (images / "link").symlink_to(images / "im")
  text = f"path,label\n{(images / 'im').resolve()}/0.png,a\n"
  [item] = _items(images, text, folder=str(images / "link"))
  assert item.key == "0.png"


@pytest.mark.parametrize(
  "path",
  [
    "/etc/passwd",
    "{folder}-other/im/0.png",
    "{folder}/../x.png",
    r"..\..\x.png",
    r"C:\data\0.png",
    "C:/data/0.png",
    r"\\server\share\0.png",
    "gs://bucket/0.png",
    "file:///etc/passwd",
  ],
)
def test_a_path_outside_the_folder_is_never_read(images, path):
  text = f"path,label\n{path.format(folder=images)},a\n"
  with pytest.raises(UserError, match=r"line 2 has the path .* not inside"):
    _items(images, text)


def test_remote_paths_are_read_if_the_folder_is_remote(images):
  tf.io.gfile.makedirs("ram://bucket/im")
  with tf.io.gfile.GFile("ram://bucket/im/0.png", "wb") as file:
    file.write(_image(7))
  text = "path,label\nram://bucket/im/0.png,a\nram://other/im/0.png,a\n"
  loaders = list(
    ManifestSource(path=_write(images, text), folder="ram://bucket").loaders()
  )
  assert loaders[0]() == Item("im/0.png", "a", _image(7))
  with pytest.raises(UserError, match=r"'ram://other/im/0\.png', which is not inside"):
    loaders[1]()


def test_backslashes_are_read_as_slashes_if_no_such_file_exists(images, caplog):
  (images / "im\\2.png").write_bytes(_image(9))
  items = _items(images, "path,label\nim\\0.png,a\nim\\2.png,b\n")
  assert _names(items) == [("im/0.png", "a"), ("im\\2.png", "b")]
  assert items[1].image == _image(9)
  assert "1 paths have backslashes, which are read as slashes, first in line 2" in (
    caplog.text
  )


@pytest.mark.parametrize("name", ["label", "key", "image"])
def test_a_column_named_like_a_feature_of_each_record_is_kept(images, name, caplog):
  text = f"path,class,{name},{name}_column\nim/0.png,a,x,z\nim/1.png,b,y,z\n"
  index = _ingested(images, text, label_column="class")
  [record] = index.read([1])
  features = tf.train.Example.FromString(record).features.feature
  assert features[f"{name}_column_"].bytes_list.value == [b"y"]
  assert features[f"{name}_column"].bytes_list.value == [b"z"]
  assert features["label"].bytes_list.value == [b"b"]
  assert f"column '{name}' becomes the feature '{name}_column_'" in caplog.text


def test_missing_number_gives_no_feature(images, caplog):
  text = "path,label,price,n\nim/0.png,a,1.5,2.0\nim/1.png,b,, 3 \nim/2.png,b,nan,\n"
  items = _items(images, text, number_columns={"price": "float", "n": "int"})
  assert [item.features for item in items] == [{"price": 1.5, "n": 2}, {"n": 3}, {}]
  assert isinstance(items[0].features["n"], int)
  assert "2 cells of column 'price' have no number, first in line 3" in caplog.text


@pytest.mark.parametrize("text", ["1.5", "1_000", "1,5", "x", "1e3", "nan"])
def test_non_integer_cell_is_refused(images, text):
  with pytest.raises(UserError, match=r"line 2 has .* which is not of type int"):
    _items(images, f"path;label;n\nim/0.png;a;{text}\n", number_columns={"n": "int"})


def test_duplicate_path_is_warned_of(images, caplog):
  _ingested(images, "path,label\nim/0.png,a\n./im/0.png,a\nim/0.png,b\nim/1.png,b\n")
  message = "2 records have the key of an earlier one, 1 of them in another class"
  assert f"{message}: im/0.png (a, b); im/0.png" in caplog.text
  assert "2 records have the content of an earlier one, 1 of them in another" in (
    caplog.text
  )
  summary = json.loads((images / "records" / "index" / "summary.json").read_text())
  assert summary["repeated_keys"] == [["im/0.png", "a", "b"], ["im/0.png", "a", "a"]]


@pytest.mark.parametrize(
  ("first", "second"),
  [("1", "1.0"), ("007", "7"), ("Cat", "cat"), ("a b", "a  b"), ("é", "e\u0301")],
)
def test_classes_that_differ_only_in_spelling_are_warned_of(
  images, first, second, caplog
):
  index = _ingested(images, f"path,label\nim/0.png,{first}\nim/1.png,{second}\n")
  assert index.num_classes == 2
  assert "Some classes have names that differ only in" in caplog.text
  assert repr(first) in caplog.text
  assert repr(second) in caplog.text


@pytest.mark.parametrize(
  ("first", "second"), [("1", "10"), ("1.0", "1.5"), ("-1", "1")]
)
def test_classes_of_different_numbers_are_not_warned_of(images, first, second, caplog):
  _ingested(images, f"path,label\nim/0.png,{first}\nim/1.png,{second}\n")
  assert "remain separate" not in caplog.text


def test_a_class_named_as_a_missing_value_is_warned_of(images, caplog):
  _ingested(images, "path,label\nim/0.png,NaN\nim/1.png,b\n")
  assert "A class is named like a missing value: 'NaN'" in caplog.text


_BAD_ROWS = "im/gone.png,a,1\n../out.png,a,1\nim/0.png,,1\nim/0.png,a\nim/0.png,a,x\n"


def test_bad_rows_and_missing_images_are_skipped(images, caplog):
  text = f"path,label,n\nim/0.png,a,1\n{_BAD_ROWS}im/1.png,b,1\n"
  index = _ingested(images, text, unreadable="leave_out", number_columns={"n": "int"})
  assert list(record_names(index, np.arange(2))) == ["im/0.png", "im/1.png"]
  assert index.num_records == 2
  assert "5 items were skipped" in caplog.text


def test_a_bad_row_is_refused_before_anything_is_written(images):
  text = "path,label\nim/0.png,a\nim/1.png,b\nim/2.png,\n"
  with pytest.raises(UserError, match="line 4 has no label"):
    _ingested(images, text)
  assert not (images / "records").exists()


def _named_records(folder, keys):
  items = [
    Item(key, f"c{number % 2}", _image(number)) for number, key in enumerate(keys)
  ]
  ingestion.write_records(items, str(folder / "r"), records_per_shard=9, fingerprint={})
  return RecordIndex.open(str(folder / "r"))


@pytest.mark.parametrize(
  ("name", "text", "encoding"),
  [
    ("t.TSV", "anchor\tpositive\tnegative\na/0\ta/2\ta/1\n", "utf-8"),
    ("t.txt", "anchor;positive;negative\na/0;a/2;a/1\n", "utf-8"),
    ("t.csv", "anchor\tpositive\tnegative\na/0\ta/2\ta/1\n", "utf-16"),
    ("t.csv", "anchor, positive, negative\na/0, a/2, a/1\n", "utf-8"),
    ("t.csv", "anchor,positive,negative\na\\0,./a/2, a/1 \n,,\n", "utf-8-sig"),
  ],
)
def test_triplets_of_other_tools_are_read(tmp_path, name, text, encoding):
  index = _named_records(tmp_path, ["a/0", "a/1", "a/2"])
  path = _write(tmp_path, text, name, encoding)
  np.testing.assert_array_equal(read_triplets(path, index, is_strict=True), [[0, 2, 1]])


def test_triplet_array_with_an_upper_case_extension_is_recognised(tmp_path):
  index = _named_records(tmp_path, ["a/0", "a/1", "a/2"])
  with open(tmp_path / "t.NPY", "wb") as file:
    np.save(file, np.array([[0, 2, 1]]))
  triplets = read_triplets(str(tmp_path / "t.NPY"), index, is_strict=True)
  np.testing.assert_array_equal(triplets, [[0, 2, 1]])


def test_exact_key_takes_precedence_over_its_normalised_form(tmp_path):
  index = _named_records(tmp_path, ["a\\0", "a/1", "a/0"])
  path = _write(tmp_path, "anchor,positive,negative\na\\0,a/0,a/1\n")
  np.testing.assert_array_equal(read_triplets(path, index, is_strict=True), [[0, 2, 1]])


def test_ambiguous_normalised_key_is_refused(tmp_path):
  index = _named_records(tmp_path, ["a/0", "a/1", "a/0"])
  path = _write(tmp_path, "anchor,positive,negative\na\\0,a\\0,a/1\n")
  with pytest.raises(UserError, match=r"'a/0' of .* belongs to two records"):
    read_triplets(path, index, is_strict=True)


def test_quotes_that_fit_only_one_separator_are_read(tmp_path):
  path = _write(tmp_path, '"a","b;c"\n"1","2"\n')
  table = CsvFile(path, ["b;c"])
  assert table.columns == ["a", "b;c"]
  assert [row.cells for row in table.rows()] == [["1", "2"]]
