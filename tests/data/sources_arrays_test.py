"""Sources of arrays: images and vectors come back, and what does not fit is refused."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import tensorflow as tf

from trainer.data.sources_arrays import Hdf5Source, NumpySource
from trainer.errors import UserError


def _write_arrays(folder, kind, inputs, labels):
  if kind == "npy":
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "labels.npy", labels)
    names = str(folder / "inputs.npy"), str(folder / "labels.npy")
    return NumpySource(inputs=names[0], labels=names[1])
  if kind == "npz":
    np.savez(folder / "both.npz", x=inputs, y=labels)
    path = folder / "both.npz"
    return NumpySource(inputs=f"{path}:x", labels=f"{path}:y")
  with h5py.File(folder / "both.h5", "w") as file:
    file["x"] = inputs
    file["y"] = labels.astype(object) if labels.dtype.kind == "U" else labels
  return Hdf5Source(path=str(folder / "both.h5"), inputs="x", labels="y")


_KINDS = ("npy", "npz", "hdf5")


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_arrays_of_images_come_back_bit_for_bit(tmp_path, kind, channels):
  images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, *channels))
  images = images.astype(np.uint8)
  source = _write_arrays(tmp_path, kind, images, np.array([1, 0, 1, 2]))
  items = list(source.items())
  decoded = np.stack([tf.io.decode_png(item.image).numpy() for item in items])
  np.testing.assert_array_equal(decoded.reshape(images.shape), images)
  assert [item.label for item in items] == ["1", "0", "1", "2"]


@pytest.mark.parametrize("kind", _KINDS)
def test_arrays_of_vectors_become_a_feature(tmp_path, kind):
  vectors = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
  source = _write_arrays(tmp_path, kind, vectors, np.array(["b", "ä", "b"]))
  items = list(source.items())
  assert [item.label for item in items] == ["b", "ä", "b"]
  assert all(item.image is None for item in items)
  np.testing.assert_array_equal([item.features["vector"] for item in items], vectors)


@pytest.mark.parametrize("kind", _KINDS)
def test_other_arrays_have_another_fingerprint(tmp_path, kind):
  vectors, labels = np.ones((4, 2), np.float32), np.arange(4)
  before = _write_arrays(tmp_path, kind, vectors, labels).fingerprint()
  assert _write_arrays(tmp_path, kind, 2 * vectors, labels).fingerprint() != before


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize(
  ("inputs", "labels", "message"),
  [
    (np.zeros((4, 2)), np.zeros((4, 1), np.int64), "they must be .N. integers or text"),
    (np.zeros((4, 2)), np.zeros((4, 3), np.int64), "they must be .N. integers or text"),
    (np.zeros((4, 2)), np.zeros(4), "type float64 and shape"),
    (np.zeros((4, 2)), np.zeros(3, np.int64), "has 4 items and 3 labels"),
    (np.zeros((4, 2, 2)), np.zeros(4, np.int64), "images must be uint8"),
  ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, kind, inputs, labels, message):
  with pytest.raises(UserError, match=message):
    list(_write_arrays(tmp_path, kind, inputs, labels).loaders())


@pytest.mark.parametrize("kind", _KINDS)
def test_a_truncated_file_of_arrays_is_named(tmp_path, kind):
  source = _write_arrays(tmp_path, kind, np.ones((400, 20)), np.arange(400))
  for path in tmp_path.iterdir():
    path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match="can't be read as"):
    list(source.loaders())


@pytest.mark.parametrize("kind", _KINDS)
def test_a_missing_file_of_arrays_is_named(tmp_path, kind):
  source = _write_arrays(tmp_path, kind, np.ones((4, 2)), np.arange(4))
  for path in tmp_path.iterdir():
    path.unlink()
  with pytest.raises(UserError, match="can't be read"):
    source.fingerprint()


def test_an_array_that_is_not_in_the_file_is_named(tmp_path):
  np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)))
  path = tmp_path / "a.npz"
  with pytest.raises(UserError, match="has no array 'y'; it has x"):
    list(NumpySource(inputs=f"{path}:x", labels=f"{path}:y").loaders())


def test_a_data_set_that_is_not_in_the_file_is_named(tmp_path):
  _write_arrays(tmp_path, "hdf5", np.zeros((2, 2)), np.arange(2))
  source = Hdf5Source(path=str(tmp_path / "both.h5"), inputs="x", labels="z")
  with pytest.raises(UserError, match="has no data set 'z'; it has x, y"):
    list(source.loaders())


def test_labels_of_arrays_get_their_names(tmp_path):
  _write_arrays(tmp_path, "npy", np.zeros((3, 2)), np.array([0, 1, 2]))
  names = {name: str(tmp_path / f"{name}.npy") for name in ("inputs", "labels")}
  with pytest.raises(UserError, match="has label 2, but class_names names only 2"):
    [load().label for load in NumpySource(**names, class_names=("a", "b")).loaders()]


def test_a_npz_file_without_the_name_of_an_array_is_refused(tmp_path):
  np.savez(tmp_path / "both.npz", x=np.ones((4, 2)), y=np.arange(4))
  path = str(tmp_path / "both.npz")
  with pytest.raises(UserError, match=r"is a \.npz file; name one of its arrays, x, y"):
    list(NumpySource(inputs=path, labels=path).loaders())


def test_a_damaged_compressed_npz_is_named(tmp_path):
  path = tmp_path / "both.npz"
  np.savez_compressed(path, x=np.arange(9000.0).reshape(-1, 2), y=np.arange(4500))
  content = bytearray(path.read_bytes())
  content[60:4000] = b"\xff" * 3940
  path.write_bytes(content)
  source = NumpySource(inputs=f"{path}:x", labels=f"{path}:y")
  with pytest.raises(UserError, match=r"both\.npz can't be read as a NumPy file"):
    list(source.loaders())


def test_images_without_pixels_are_refused(tmp_path):
  source = _write_arrays(tmp_path, "npy", np.zeros((2, 0, 3), np.uint8), np.arange(2))
  with pytest.raises(UserError, match=r"shape \(0, 3\) can't be kept"):
    list(source.items())


@pytest.mark.parametrize("kind", ["npy", "hdf5"])
def test_labels_that_are_no_utf8_are_refused(tmp_path, kind):
  labels = np.array([b"a", b"\xff\xfe"])
  source = _write_arrays(tmp_path, kind, np.ones((2, 2), np.float32), labels)
  with pytest.raises(UserError, match=r"has a label .*that is no UTF-8"):
    list(source.items())


def test_a_group_of_hdf5_is_no_data_set(tmp_path):
  with h5py.File(tmp_path / "a.h5", "w") as file:
    file.create_group("x")
    file["y"] = np.arange(3)
  with pytest.raises(UserError, match="has no data set 'x'"):
    list(Hdf5Source(path=str(tmp_path / "a.h5"), inputs="x", labels="y").loaders())


@pytest.mark.parametrize("kind", _KINDS)
def test_arrays_know_how_many_items_they_have(tmp_path, kind):
  source = _write_arrays(tmp_path, kind, np.zeros((5, 2), np.float32), np.arange(5))
  assert source.num_items() == len(list(source.items())) == 5
