"""Sources of arrays: images and vectors are read, mismatched arrays refused."""

from __future__ import annotations

import io
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf

from trainer.data.sources.arrays import Hdf5Source, NumpySource
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
def test_image_arrays_are_read_bit_for_bit(tmp_path, kind, channels):
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
def test_different_arrays_have_different_fingerprints(tmp_path, kind):
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
def test_mismatched_arrays_are_refused(tmp_path, kind, inputs, labels, message):
  with pytest.raises(UserError, match=message):
    list(_write_arrays(tmp_path, kind, inputs, labels).loaders())


@pytest.mark.parametrize("kind", _KINDS)
def test_truncated_array_file_is_named(tmp_path, kind):
  source = _write_arrays(tmp_path, kind, np.ones((400, 20)), np.arange(400))
  for path in tmp_path.iterdir():
    path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match="can't be read as"):
    list(source.loaders())


@pytest.mark.parametrize("kind", _KINDS)
def test_missing_array_file_is_named(tmp_path, kind):
  source = _write_arrays(tmp_path, kind, np.ones((4, 2)), np.arange(4))
  for path in tmp_path.iterdir():
    path.unlink()
  with pytest.raises(UserError, match="can't be read"):
    source.fingerprint()


def test_missing_array_is_named(tmp_path):
  np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)))
  path = tmp_path / "a.npz"
  with pytest.raises(UserError, match="has no array 'y'; it has x"):
    list(NumpySource(inputs=f"{path}:x", labels=f"{path}:y").loaders())


def test_missing_hdf5_data_set_is_named(tmp_path):
  _write_arrays(tmp_path, "hdf5", np.zeros((2, 2)), np.arange(2))
  source = Hdf5Source(path=str(tmp_path / "both.h5"), inputs="x", labels="z")
  with pytest.raises(UserError, match="has no data set 'z'; it has x, y"):
    list(source.loaders())


def test_labels_of_arrays_have_their_class_names(tmp_path):
  _write_arrays(tmp_path, "npy", np.zeros((3, 2)), np.array([0, 1, 2]))
  names = {name: str(tmp_path / f"{name}.npy") for name in ("inputs", "labels")}
  with pytest.raises(UserError, match="has label 2, but class_names has only 2"):
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
  with pytest.raises(UserError, match=r"shape \(0, 3\) can't be stored"):
    list(source.items())


@pytest.mark.parametrize("kind", ["npy", "hdf5"])
def test_labels_that_are_not_utf8_are_refused(tmp_path, kind):
  labels = np.array([b"a", b"\xff\xfe"])
  source = _write_arrays(tmp_path, kind, np.ones((2, 2), np.float32), labels)
  with pytest.raises(UserError, match=r"has a label .*that is not UTF-8"):
    list(source.items())


def test_hdf5_group_is_not_a_data_set(tmp_path):
  with h5py.File(tmp_path / "a.h5", "w") as file:
    file.create_group("x")
    file["y"] = np.arange(3)
  with pytest.raises(UserError, match="has no data set 'x'"):
    list(Hdf5Source(path=str(tmp_path / "a.h5"), inputs="x", labels="y").loaders())


@pytest.mark.parametrize("kind", _KINDS)
def test_items_of_arrays_are_counted(tmp_path, kind):
  source = _write_arrays(tmp_path, kind, np.zeros((5, 2), np.float32), np.arange(5))
  assert source.num_items() == len(list(source.items())) == 5


def _two_datasets(folder, inputs, labels, **attributes):
  with h5py.File(folder / "a.h5", "w") as file:
    file["x"], file["y"] = inputs, labels
    for name, value in attributes.items():
      file[name[0]].attrs[name[1:]] = value
  return Hdf5Source(path=str(folder / "a.h5"), inputs="x", labels="y")


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize(
  ("row", "message"),
  [
    (np.array([1.0, np.nan]), "/2 has nan in its vector"),
    (np.array([1.0, np.inf], np.float32), "/2 has inf in its vector"),
    (np.array([1.0, 1e300]), r"/2 has 1e\+300 in its vector"),
    (np.array([1, 2**24 + 1]), r"/2 has integers above 16,777,216 in its vector"),
    (
      np.array([1, 2**64 - 1], np.uint64),
      r"/2 has integers above 16,777,216 in its vector",
    ),
  ],
)
def test_values_beyond_float32_are_refused(tmp_path, kind, row, message):
  vectors = np.ones((4, 2), row.dtype)
  vectors[2] = row
  source = _write_arrays(tmp_path, kind, vectors, np.arange(4))
  loaders = list(source.loaders())
  assert loaders[1]().features["vector"].tolist() == [1, 1]
  with pytest.raises(UserError, match=message):
    loaders[2]()


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("dtype", [">f4", "<f8", ">i2", "<u8", "<f2"])
def test_vectors_of_every_type_and_byte_order_are_read(tmp_path, kind, dtype):
  vectors = np.arange(8).reshape(4, 2).astype(dtype)
  items = list(_write_arrays(tmp_path, kind, vectors, np.arange(4)).items())
  found = np.stack([item.features["vector"] for item in items])
  np.testing.assert_array_equal(found, np.arange(8.0).reshape(4, 2))


@pytest.mark.parametrize("kind", _KINDS)
def test_an_empty_label_is_refused(tmp_path, kind):
  labels = np.array(["a", "", "b"])
  source = _write_arrays(tmp_path, kind, np.ones((3, 2), np.float32), labels)
  with pytest.raises(UserError, match="/1 has no label"):
    list(source.items())


def test_arrays_of_python_objects_are_refused(tmp_path):
  ragged = np.empty(2, object)
  ragged[:] = [np.ones(2), np.ones(3)]
  np.save(tmp_path / "x.npy", ragged, allow_pickle=True)
  np.save(tmp_path / "y.npy", np.array(["a", None], object), allow_pickle=True)
  np.save(tmp_path / "z.npy", np.ones((2, 2)))
  for inputs, labels in (("x", "z"), ("z", "y")):
    names = [str(tmp_path / f"{name}.npy") for name in (inputs, labels)]
    with pytest.raises(
      UserError, match=r"holds Python objects .* save it as an array of numbers"
    ):
      list(NumpySource(inputs=names[0], labels=names[1]).loaders())


@pytest.mark.parametrize("num_bytes", [40, 400])
def test_damaged_array_header_is_named(tmp_path, num_bytes):
  path = tmp_path / "x.npy"
  np.save(path, np.ones((50, 2)))
  content = path.read_bytes()
  for hostile in (b"(" * num_bytes, b"{'" * num_bytes, b"\xff" * num_bytes):
    path.write_bytes(content[:10] + hostile[: len(content) - 10])
    with pytest.raises(UserError, match=r"x\.npy can't be read as a NumPy file"):
      list(NumpySource(inputs=str(path), labels=str(path)).loaders())


def test_array_larger_than_memory_is_named(tmp_path):
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50, 2)}
  )
  with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
    archive.writestr("x.npy", file.getvalue())
  name = f"{tmp_path / 'a.npz'}:x"
  with pytest.raises(UserError, match=r"a\.npz can't be read as a NumPy file"):
    list(NumpySource(inputs=name, labels=name).loaders())


def test_ragged_rows_of_hdf5_are_refused(tmp_path):
  rows = np.empty(2, object)
  rows[:] = [np.ones(2, np.float32), np.ones(3, np.float32)]
  with h5py.File(tmp_path / "a.h5", "w") as file:
    kind = h5py.vlen_dtype(np.float32)
    file.create_dataset("x", data=rows, dtype=kind)
    file["y"] = np.arange(2)
  source = Hdf5Source(path=str(tmp_path / "a.h5"), inputs="x", labels="y")
  with pytest.raises(UserError, match="x has type object and shape"):
    list(source.loaders())


def test_netcdf_missing_values_are_refused(tmp_path):
  vectors = np.array([[1, 2], [3, -999], [5, 6]], np.float32)
  source = _two_datasets(
    tmp_path, vectors, [0, 1, -1], x_FillValue=-999.0, ymissing_value=-1
  )
  first, second, third = source.loaders()
  assert first().features["vector"].tolist() == [1, 2]
  with pytest.raises(UserError, match=r"x/1 has missing values \(-999\.0\)"):
    second()
  with pytest.raises(UserError, match="x/2 has no label"):
    third()


def test_unwritten_labels_are_refused(tmp_path):
  with h5py.File(tmp_path / "a.h5", "w") as file:
    file["x"] = np.ones((3, 2), np.float32)
    file.create_dataset("y", 3, dtype=h5py.string_dtype())[:2] = ["a", "b"]
  source = Hdf5Source(path=str(tmp_path / "a.h5"), inputs="x", labels="y")
  with pytest.raises(UserError, match="x/2 has no label"):
    list(source.items())


def test_external_data_sets_are_refused(tmp_path):
  layout = h5py.VirtualLayout(shape=(3, 2), dtype="f4")
  layout[:] = h5py.VirtualSource(str(tmp_path / "gone.h5"), "x", shape=(3, 2))
  with h5py.File(tmp_path / "a.h5", "w") as file:
    file.create_virtual_dataset("x", layout)
    file["y"] = np.arange(3)
  source = Hdf5Source(path=str(tmp_path / "a.h5"), inputs="x", labels="y")
  with pytest.raises(UserError, match="'x' is stored in other files; copy it into one"):
    list(source.loaders())


def test_hdf5_is_read_in_ordered_chunks(tmp_path):
  vectors = np.arange(3 << 19, dtype=np.float32).reshape(-1, 1 << 10)
  labels = [f"c{n % 7}" for n in range(len(vectors))]
  source = _two_datasets(tmp_path, vectors, labels)
  items = list(source.items())
  found = np.stack([item.features["vector"] for item in items])
  np.testing.assert_array_equal(found, vectors)
  assert [item.label for item in items] == labels
  assert [item.key for item in items] == [f"x/{n}" for n in range(len(vectors))]
