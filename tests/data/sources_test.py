"""Sources: what they yield, and what they say of missing and damaged files."""

from __future__ import annotations

import gzip
import os
import struct

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.sources import DigitsSource
from trainer.data.sources_folder import ImageFolderSource
from trainer.data.sources_idx import IdxSource
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


def test_digits_are_scaled_from_no_ink_to_full_ink():
  items = list(DigitsSource().items())
  images = np.stack([tf.io.decode_png(item.image).numpy() for item in items[:200]])
  assert len(items) == 1797
  assert {item.label for item in items} == set("0123456789")
  assert images.shape[1:] == (8, 8, 1)
  assert (images.min(), images.max()) == (0, 255)


def test_idx_images_come_back_bit_for_bit(idx_folder):
  items = list(_source(idx_folder).items())
  decoded = [tf.io.decode_png(item.image).numpy()[..., 0] for item in items]
  np.testing.assert_array_equal(decoded, _images())
  assert [item.label for item in items] == [str(n % 3) for n in range(12)]
  assert [item.key for item in items] == [f"images/{n}" for n in range(12)]


def test_idx_pairs_follow_each_other(idx_folder):
  _write_idx(idx_folder / "more", _images(2))
  _write_idx(idx_folder / "more_labels", np.array([2, 0], np.uint8))
  pairs = [("images", "labels"), ("more", "more_labels")]
  items = list(IdxSource(folder=str(idx_folder), pairs=pairs).items())
  assert [(item.key, item.label) for item in items[11:]] == [
    ("images/11", "2"),
    ("more/0", "2"),
    ("more/1", "0"),
  ]


def test_labels_get_their_names(idx_folder):
  items = list(_source(idx_folder, class_names=("shirt", "bag", "shoe")).items())
  assert [item.label for item in items[:4]] == ["shirt", "bag", "shoe", "shirt"]


def test_a_label_without_a_name_is_refused(idx_folder):
  with pytest.raises(UserError, match="labels: record 2 has label 2"):
    list(_source(idx_folder, class_names=("a", "b")).items())


def test_two_labels_of_one_name_are_refused(idx_folder):
  with pytest.raises(UserError, match="must be different names"):
    _source(idx_folder, class_names=("a", "b", "a"))


@pytest.mark.parametrize("pairs", [(), ("images", "labels"), [("images",)]])
def test_pairs_that_are_none_are_refused(pairs):
  with pytest.raises(UserError, match=r"IdxSource\.pairs=.* must be pairs"):
    IdxSource(folder="anywhere", pairs=pairs)


def test_a_missing_idx_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"images is not there"):
    _source(tmp_path).fingerprint()


def test_data_sets_of_equal_names_and_sizes_have_different_fingerprints(idx_folder):
  before = _source(idx_folder).fingerprint()
  _write_idx(idx_folder / "images", 255 - _images())
  assert _source(idx_folder).fingerprint() != before


def test_a_truncated_idx_file_is_named_with_its_last_whole_record(idx_folder):
  path = idx_folder / "images"
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(UserError, match=r"images is damaged.*12 records.*10 whole"):
    list(_source(idx_folder).items())


def test_an_idx_file_with_more_than_its_head_says_is_named(idx_folder):
  with open(idx_folder / "images", "ab") as file:
    file.write(b"more")
  with pytest.raises(UserError, match=r"images is damaged.*244 bytes where 240"):
    list(_source(idx_folder).items())


@pytest.mark.parametrize("keep", [0, 3, 10])
def test_an_idx_file_without_its_whole_head_is_named(idx_folder, keep):
  path = idx_folder / "images"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match="images is no idx file"):
    list(_source(idx_folder).items())


@pytest.mark.parametrize("position", range(4))
def test_a_flipped_magic_byte_is_named(idx_folder, position):
  path = idx_folder / "images"
  content = bytearray(path.read_bytes())
  content[position] ^= 0x10
  path.write_bytes(content)
  with pytest.raises(UserError, match="images is no idx file"):
    list(_source(idx_folder).items())


@pytest.mark.parametrize("shape", [(12, 0, 4), (2**31, 2**31, 4)])
def test_an_impossible_shape_is_named(idx_folder, shape):
  (idx_folder / "images").write_bytes(_idx_bytes(shape, b"\0" * 240))
  with pytest.raises(UserError, match="images is damaged: its head says"):
    list(_source(idx_folder).items())


def test_a_truncated_gzip_is_named(idx_folder):
  path = idx_folder / "labels.gz"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match=r"labels\.gz can't be read"):
    list(_source(idx_folder).items())


def test_every_flipped_byte_of_gzipped_data_is_noticed(idx_folder):
  path = idx_folder / "labels.gz"
  whole = path.read_bytes()
  for position in range(10, len(whole)):  # Before, time and name of the file stand.
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


def test_hidden_and_other_files_are_passed_over(image_folder):
  for name in (".hidden.png", "Thumbs.db", "notes.txt"):
    (image_folder / "b" / name).write_bytes(b"no image")
  (image_folder / ".cache").mkdir()
  (image_folder / "loose.png").write_bytes(b"in no class")
  assert len(_folder_items(image_folder)) == 6


def test_another_size_of_a_file_is_another_fingerprint(image_folder):
  before = ImageFolderSource(folder=str(image_folder)).fingerprint()
  with open(image_folder / "b" / "0.png", "ab") as file:
    file.write(b"\0")
  after = ImageFolderSource(folder=str(image_folder)).fingerprint()
  assert before["num_files"] == after["num_files"] == 6
  assert before["digest"] != after["digest"]


def test_class_folders_without_images_are_left_out_and_named(image_folder, caplog):
  (image_folder / "bare").mkdir()
  assert {item.label for item in _folder_items(image_folder)} == {"Käse Brot", "b"}
  assert "1 class folders hold no image and are left out: bare" in caplog.text


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
    ImageFolderSource(folder=str(image_folder)).fingerprint()


def test_a_folder_named_like_an_image_is_named(image_folder):
  (image_folder / "b" / "9.png").mkdir()
  with pytest.raises(UserError, match=r"b/9\.png can't be read: Is a directory"):
    _folder_items(image_folder)


def test_a_class_name_that_is_no_utf8_is_refused(image_folder):
  folder = os.fsencode(image_folder) + b"/caf\xe9"
  os.mkdir(folder)
  with pytest.raises(UserError, match="needs a name in UTF-8"):
    _folder_items(image_folder)


def test_sources_of_files_know_how_many_items_they_have(idx_folder):
  assert _source(idx_folder).num_items() == 12
  (idx_folder / "labels.gz").rename(idx_folder / "labels.idx.gz")
  plain = gzip.decompress((idx_folder / "labels.idx.gz").read_bytes())
  (idx_folder / "labels").write_bytes(plain)
  assert _source(idx_folder).num_items() == 12
  assert DigitsSource().num_items() == len(list(DigitsSource().loaders()))


def test_a_folder_knows_how_many_items_it_has(image_folder):
  assert ImageFolderSource(folder=str(image_folder)).num_items() == 6


def test_a_file_without_a_head_is_named_when_it_is_counted(idx_folder):
  (idx_folder / "labels.gz").write_bytes(gzip.compress(b"\0\0"))
  with pytest.raises(UserError, match=r"labels\.gz is no idx file .* it has no head"):
    _source(idx_folder).num_items()
