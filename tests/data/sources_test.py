"""Sources: their items, and errors for missing and damaged files."""

from __future__ import annotations

import gzip
import json
import os
import struct

import numpy as np
import pytest
import tensorflow as tf

from trainer.cli.ingest import ingest
from trainer.data.sources.arrays import IdxSource
from trainer.data.sources.image_folders import ImageFolderSource
from trainer.data.sources.source import DigitsSource
from trainer.errors import UserError


def _idx_bytes(shape, content):
  return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + content


def _write_idx(path, array):
  path.write_bytes(_idx_bytes(array.shape, array.tobytes()))


def _source(folder, **options):
  return IdxSource(folder=str(folder), pairs=[("images", "labels")], **options)


def _images(num_images=12):
  return np.random.default_rng(1).integers(0, 256, (num_images, 5, 4)).astype(np.uint8)


@pytest.fixture
def idx_folder(tmp_path):
  """Twelve random images of three classes; the labels are gzipped."""
  _write_idx(tmp_path / "images", _images())
  labels = np.arange(12, dtype=np.uint8) % 3
  (tmp_path / "labels.gz").write_bytes(
    gzip.compress(_idx_bytes(labels.shape, labels.tobytes()))
  )
  return tmp_path


@pytest.fixture
def image_folder(tmp_path):
  """Two classes of three images, one name with a space and letters beyond ASCII."""
  rng = np.random.default_rng(2)
  for name in ("Käse Brot", "b"):
    (tmp_path / name).mkdir()
    for number in range(3):
      image = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
      file = tmp_path / name / f"{number}.png"
      file.write_bytes(tf.io.encode_png(image).numpy())
  return tmp_path


def _folder_items(folder):
  return list(ImageFolderSource(folder=str(folder)).items())


def test_digits_are_scaled_to_the_full_range():
  items = list(DigitsSource().items())
  images = np.stack([tf.io.decode_png(item.image).numpy() for item in items[:200]])
  assert len(items) == 1797
  assert {item.label for item in items} == set("0123456789")
  assert images.shape[1:] == (8, 8, 1)
  assert (images.min(), images.max()) == (0, 255)


def test_idx_images_are_read_bit_for_bit(idx_folder):
  items = list(_source(idx_folder).items())
  decoded = [tf.io.decode_png(item.image).numpy()[..., 0] for item in items]
  np.testing.assert_array_equal(decoded, _images())
  assert [item.label for item in items] == [str(n % 3) for n in range(12)]
  assert [item.key for item in items] == [f"images/{n}" for n in range(12)]


def test_idx_pairs_are_concatenated(idx_folder):
  _write_idx(idx_folder / "more", _images(2))
  _write_idx(idx_folder / "more_labels", np.array([2, 0], np.uint8))
  pairs = [("images", "labels"), ("more", "more_labels")]
  items = list(IdxSource(folder=str(idx_folder), pairs=pairs).items())
  assert [(item.key, item.label) for item in items[11:]] == [
    ("images/11", "2"),
    ("more/0", "2"),
    ("more/1", "0"),
  ]


def test_labels_have_their_class_names(idx_folder):
  items = list(_source(idx_folder, class_names=("shirt", "bag", "shoe")).items())
  assert [item.label for item in items[:4]] == ["shirt", "bag", "shoe", "shirt"]


def test_a_label_without_a_name_is_refused(idx_folder):
  with pytest.raises(UserError, match="labels: record 2 has label 2"):
    list(_source(idx_folder, class_names=("a", "b")).items())


def test_two_labels_of_one_name_are_refused(idx_folder):
  with pytest.raises(UserError, match="must have a different name"):
    _source(idx_folder, class_names=("a", "b", "a"))


def test_string_of_label_names_is_refused(idx_folder):
  with pytest.raises(UserError, match="class_names='abc' must be a list of names"):
    _source(idx_folder, class_names="abc")


@pytest.mark.parametrize("pairs", [(), ("images", "labels"), [("images",)]])
def test_invalid_pairs_are_refused(pairs):
  with pytest.raises(UserError, match=r"IdxSource\.pairs=.* must be pairs"):
    IdxSource(folder="anywhere", pairs=pairs)


def test_a_missing_idx_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"images does not exist"):
    _source(tmp_path).fingerprint()


def test_data_sets_of_equal_names_and_sizes_have_different_fingerprints(idx_folder):
  before = _source(idx_folder).fingerprint()
  _write_idx(idx_folder / "images", 255 - _images())
  assert _source(idx_folder).fingerprint() != before


def test_a_truncated_idx_file_is_named_with_its_last_whole_record(idx_folder):
  path = idx_folder / "images"
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(UserError, match=r"images is damaged.*12 records.*10 complete"):
    list(_source(idx_folder).items())


def test_idx_file_with_trailing_bytes_is_named(idx_folder):
  with open(idx_folder / "images", "ab") as file:
    file.write(b"more")
  with pytest.raises(UserError, match=r"images is damaged.*244 of 240 bytes"):
    list(_source(idx_folder).items())


@pytest.mark.parametrize("keep", [0, 3, 10])
def test_idx_file_with_a_truncated_header_is_named(idx_folder, keep):
  path = idx_folder / "images"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match="images is not an idx file"):
    list(_source(idx_folder).items())


@pytest.mark.parametrize("position", range(4))
def test_a_flipped_magic_byte_is_named(idx_folder, position):
  path = idx_folder / "images"
  content = bytearray(path.read_bytes())
  content[position] ^= 0x10
  path.write_bytes(content)
  with pytest.raises(UserError, match="images is not an idx file"):
    list(_source(idx_folder).items())


@pytest.mark.parametrize("shape", [(12, 0, 4), (2**31, 2**31, 4)])
def test_an_impossible_shape_is_named(idx_folder, shape):
  (idx_folder / "images").write_bytes(_idx_bytes(shape, b"\0" * 240))
  with pytest.raises(UserError, match="images is damaged: its header declares"):
    list(_source(idx_folder).items())


def test_a_truncated_gzip_is_named(idx_folder):
  path = idx_folder / "labels.gz"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match=r"labels\.gz can't be read"):
    list(_source(idx_folder).items())


def test_every_flipped_byte_of_gzipped_data_is_detected(idx_folder):
  path = idx_folder / "labels.gz"
  whole = path.read_bytes()
  for position in range(10, len(whole)):  # Earlier bytes are time and name.
    path.write_bytes(
      whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
    )
    with pytest.raises(UserError, match=r"labels\.gz"):
      list(_source(idx_folder).items())


def test_images_and_labels_of_different_length_are_refused(idx_folder):
  _write_idx(idx_folder / "labels", np.zeros(11, np.uint8))
  with pytest.raises(UserError, match="12 images and labels 11"):
    list(_source(idx_folder).items())


def test_image_files_are_kept_byte_for_byte(image_folder):
  items = _folder_items(image_folder)
  assert [item.label for item in items] == ["Käse Brot"] * 3 + ["b"] * 3
  for item in items:
    assert item.image == (image_folder / item.key).read_bytes()


def test_hidden_and_other_files_are_skipped(image_folder, caplog):
  for name in (".hidden.png", "Thumbs.db", "notes.txt"):
    (image_folder / "b" / name).write_bytes(b"no image")
  (image_folder / ".cache").mkdir()
  (image_folder / "loose.png").write_bytes(b"in no class")
  assert len(_folder_items(image_folder)) == 6
  assert "1 images next to the class folders (loose.png)" in caplog.text
  assert "2 files without the extension of an image (1 .db, 1 .txt)" in caplog.text


def _add_images(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(name.encode())


def _keys_and_labels(folder, **options):
  items = ImageFolderSource(folder=str(folder), **options).items()
  return [(item.key, item.label) for item in items]


@pytest.fixture
def nested_folder(tmp_path):
  """Two classes, one with images in subfolders, and a third with only those."""
  _add_images(tmp_path, "a/0.png", "b/0.JPG", "b/x/1.tiff", "b/x/y/2.png", "c/z/3.jp2")
  return tmp_path


def test_images_below_class_folders_are_counted(nested_folder, caplog):
  found = _keys_and_labels(nested_folder)
  assert found == [("a/0.png", "a"), ("b/0.JPG", "b")]
  assert "3 images in folders below the class folders" in caplog.text
  assert "(b/x/1.tiff, b/x/y/2.png, c/z/3.jp2)" in caplog.text


def test_many_images_below_class_folders_are_reported_in_one_line(
  nested_folder, caplog
):
  _add_images(nested_folder, *(f"a/more/{number}.png" for number in range(20)))
  _keys_and_labels(nested_folder)
  lines = [record.message for record in caplog.records if " below " in record.message]
  assert len(lines) == 1
  assert "23 images" in lines[0]
  assert lines[0].count(".png") == 5


def test_images_below_class_folders_may_belong_to_the_class(nested_folder, caplog):
  assert _keys_and_labels(nested_folder, subfolders="of_class") == [
    ("a/0.png", "a"),
    ("b/0.JPG", "b"),
    ("b/x/1.tiff", "b"),
    ("b/x/y/2.png", "b"),
    ("c/z/3.jp2", "c"),
  ]
  assert not caplog.text


def test_folders_below_class_folders_can_be_classes(nested_folder, caplog):
  assert _keys_and_labels(nested_folder, subfolders="classes") == [
    ("a/0.png", "a"),
    ("b/0.JPG", "b"),
    ("b/x/1.tiff", "b/x"),
    ("b/x/y/2.png", "b/x/y"),
    ("c/z/3.jp2", "c/z"),
  ]
  assert not caplog.text


@pytest.mark.parametrize("subfolders", ["leave_out", "of_class", "classes"])
def test_cyclic_links_terminate(nested_folder, subfolders):
  for name in ("b/x/up", "loop", "a/self"):
    (nested_folder / name).symlink_to(nested_folder, target_is_directory=True)
  (nested_folder / "b/x/y/b").symlink_to(nested_folder / "b")
  (nested_folder / "b/itself").symlink_to(nested_folder / "b/itself")
  (nested_folder / "itself").symlink_to(nested_folder / "itself")
  num_files = {"leave_out": 2, "of_class": 5, "classes": 5}[subfolders]
  found = _keys_and_labels(nested_folder, subfolders=subfolders)
  assert len(found) == num_files


def test_subfolder_option_is_part_of_the_fingerprint(nested_folder):
  sources = [
    ImageFolderSource(folder=str(nested_folder), subfolders=subfolders)
    for subfolders in ("leave_out", "of_class", "classes")
  ]
  fingerprints = [str(source.fingerprint()) for source in sources]
  assert len({*fingerprints}) == 3
  assert "subfolders" not in fingerprints[0]


def test_unknown_subfolder_option_is_refused():
  with pytest.raises(UserError, match="must be one of leave_out, of_class, classes"):
    ImageFolderSource(folder="a", subfolders="all")


@pytest.fixture
def split_folder(tmp_path):
  """Classes in two splits, and other files."""
  _add_images(tmp_path, "train/a/0.png", "train/b/1.png", "Val/a/2.png", "Val/c/3.png")
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes" / "info.json").write_text("{}")
  return tmp_path


@pytest.mark.parametrize("subfolders", ["leave_out", "of_class", "classes"])
def test_splits_above_the_class_folders_are_explained(split_folder, subfolders):
  source = ImageFolderSource(folder=str(split_folder), subfolders=subfolders)
  message = r"holds Val, train above the class folders; set ImageFolderSource\.splits ="
  with pytest.raises(UserError, match=message):
    source.fingerprint()


def test_selected_splits_are_read(split_folder, caplog):
  source = ImageFolderSource(folder=str(split_folder), splits=("train", "Val"))
  assert [(item.key, item.label, item.features) for item in source.items()] == [
    ("train/a/0.png", "a", {"split": "train"}),
    ("train/b/1.png", "b", {"split": "train"}),
    ("Val/a/2.png", "a", {"split": "Val"}),
    ("Val/c/3.png", "c", {"split": "Val"}),
  ]
  assert source.fingerprint()["splits"] == ["train", "Val"]
  assert "1 folders that are not in ImageFolderSource.splits (notes)" in caplog.text


def test_nested_classes_of_splits_are_named_without_the_split(split_folder):
  _add_images(split_folder, "train/a/x/4.png", "Val/a/x/5.png")
  options = {"splits": ("train", "Val"), "subfolders": "classes"}
  labels = {label for _, label in _keys_and_labels(split_folder, **options)}
  assert labels == {"a", "a/x", "b", "c"}


def test_folder_may_be_a_single_split(split_folder):
  found = _keys_and_labels(split_folder / "train")
  assert found == [("a/0.png", "a"), ("b/1.png", "b")]


def test_missing_split_is_named(split_folder):
  with pytest.raises(UserError, match="test can't be read: No such file"):
    _keys_and_labels(split_folder, splits=("train", "test"))


def test_string_of_splits_is_refused():
  with pytest.raises(UserError, match="splits='train' must be a list of names"):
    ImageFolderSource(folder="a", splits="train")


def test_classes_with_names_of_splits_are_read_with_a_warning(tmp_path, caplog):
  _add_images(tmp_path, "train/0.png", "test/1.png")
  assert len(_keys_and_labels(tmp_path)) == 2
  assert "the classes are named like splits: test, train" in caplog.text


def test_split_names_are_classes_if_splits_is_empty(split_folder):
  found = _keys_and_labels(split_folder, splits=(), subfolders="of_class")
  assert {label for _, label in found} == {"train", "Val"}


def test_one_folder_named_like_a_split_is_a_class(tmp_path, caplog):
  _add_images(tmp_path, "test/0.png", "a/1.png", "b/2.png")
  assert {label for _, label in _keys_and_labels(tmp_path)} == {"test", "a", "b"}
  assert not caplog.text


def test_broken_link_is_skipped_like_other_bad_items(image_folder):
  (image_folder / "b" / "9.png").symlink_to(image_folder / "gone")
  (image_folder / "b" / "8.png").symlink_to(image_folder / "b" / "8.png")
  target = image_folder.parent / "left_out_records"
  source = ImageFolderSource(folder=str(image_folder))
  ingest(source=source, folder=str(target), unreadable="leave_out")
  summary = json.loads((target / "index" / "summary.json").read_text())
  assert summary["num_records"] == 6
  assert [reason.split(" can't")[0][-7:] for reason in summary["unreadable"]] == [
    "b/8.png",
    "b/9.png",
  ]


def test_a_broken_link_is_refused_before_anything_is_written(image_folder):
  (image_folder / "b" / "9.png").symlink_to(image_folder / "gone")
  target = image_folder.parent / "refused_records"
  with pytest.raises(UserError, match=r"b/9\.png can't be read: No such file"):
    ingest(source=ImageFolderSource(folder=str(image_folder)), folder=str(target))
  assert not target.exists()


def test_fingerprint_depends_on_file_sizes(image_folder):
  before = ImageFolderSource(folder=str(image_folder)).fingerprint()
  with open(image_folder / "b" / "0.png", "ab") as file:
    file.write(b"\0")
  after = ImageFolderSource(folder=str(image_folder)).fingerprint()
  assert before["num_files"] == after["num_files"] == 6
  assert before["digest"] != after["digest"]


def test_class_folders_without_images_are_skipped_and_named(image_folder, caplog):
  (image_folder / "bare").mkdir()
  assert {item.label for item in _folder_items(image_folder)} == {"Käse Brot", "b"}
  assert "1 class folders have no image and are skipped (bare)" in caplog.text


def test_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds images of 0 classes"):
    _folder_items(tmp_path)


def test_one_class_is_refused_before_any_file_is_read(image_folder):
  for path in (image_folder / "b").iterdir():
    path.unlink()
  with pytest.raises(UserError, match="holds images of 1 classes"):
    ImageFolderSource(folder=str(image_folder)).fingerprint()


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(UserError, match="gone can't be read: No such file"):
    _folder_items(tmp_path / "gone")


def test_a_folder_that_is_a_file_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file can't be read: Not a directory"):
    _folder_items(tmp_path / "file")


def test_a_broken_link_is_named(image_folder):
  (image_folder / "b" / "9.png").symlink_to(image_folder / "gone")
  with pytest.raises(UserError, match=r"b/9\.png can't be read: No such file"):
    ImageFolderSource(folder=str(image_folder)).check()


def test_a_folder_named_like_an_image_is_named(image_folder):
  (image_folder / "b" / "9.png").mkdir()
  with pytest.raises(UserError, match=r"b/9\.png can't be read: Is a directory"):
    _folder_items(image_folder)


def test_class_name_that_is_not_utf8_is_refused(image_folder):
  folder = os.fsencode(image_folder) + b"/caf\xe9"
  os.mkdir(folder)
  with pytest.raises(UserError, match="a class name must be UTF-8"):
    _folder_items(image_folder)


def test_items_of_file_sources_are_counted(idx_folder):
  assert _source(idx_folder).num_items() == 12
  (idx_folder / "labels.gz").rename(idx_folder / "labels.idx.gz")
  plain = gzip.decompress((idx_folder / "labels.idx.gz").read_bytes())
  (idx_folder / "labels").write_bytes(plain)
  assert _source(idx_folder).num_items() == 12
  assert DigitsSource().num_items() == len(list(DigitsSource().loaders()))


def test_items_of_a_folder_are_counted(image_folder):
  assert ImageFolderSource(folder=str(image_folder)).num_items() == 6


def test_file_without_a_header_is_named_when_counted(idx_folder):
  (idx_folder / "labels.gz").write_bytes(gzip.compress(b"\0\0"))
  with pytest.raises(
    UserError, match=r"labels\.gz is not an idx file .* its header is incomplete"
  ):
    _source(idx_folder).num_items()
