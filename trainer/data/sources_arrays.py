"""Arrays of images or vectors with an array of labels: NumPy files and HDF5.

Shapes: N items, H × W pixels, C channels, D numbers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import gin
import numpy as np

from trainer.data import paths
from trainer.data.sources import Item, Loader, Source, encode_png, text_of
from trainer.errors import UserError

# RuntimeError: a .npz file that is encrypted, or compressed by other means.
_NO_NUMPY_FILE = (
  OSError,
  ValueError,
  EOFError,
  RuntimeError,
  zipfile.BadZipFile,
  zlib.error,
)
_CHUNK_BYTES = 16 << 20


@gin.register
class NumpySource(Source):
  """Inputs and labels in two .npy files, or in one .npz file.

  Inputs of type uint8 with 3 or 4 axes are images, [N, H, W] or [N, H, W, C]; others
  are vectors, [N, D], and become the feature `vector`.

  Args:
    inputs: path of a .npy file, or "file.npz:name" for an array in a .npz file.
    labels: likewise; [N] integers or text.
    class_names: names of labels 0, 1, …; None for the labels themselves.
  """

  def __init__(
    self, *, inputs: str, labels: str, class_names: Optional[Sequence[str]] = None
  ):
    self._inputs = inputs
    self._labels = labels
    self._class_names = class_names

  def fingerprint(self) -> dict[str, object]:
    """Digests of the files."""
    names = (self._inputs, self._labels)
    return {
      "source": "numpy",
      "arrays": [[name, _digest(_file_of(name)[0])] for name in names],
      "class_names": list(self._class_names or ()),
    }

  def num_items(self) -> int:
    """Labels."""
    return _load_array(self._labels).size

  def loaders(self) -> Iterator[Loader]:
    """Every row; keys are the inputs' file and the number in it.

    Raises:
      UserError: a file can't be read, or the arrays don't fit each other.
    """
    arrays = _load_array(self._inputs), _load_array(self._labels)
    yield from _loaders(self._inputs, *arrays, self._class_names)


@gin.register
class Hdf5Source(Source):
  """Inputs and labels as two data sets of an HDF5 file.

  Args:
    path: the file, on this machine.
    inputs: name of the data set of images or vectors, as for `NumpySource`.
    labels: name of the data set of labels, [N] integers or text.
    class_names: names of labels 0, 1, …; None for the labels themselves.
  """

  def __init__(
    self,
    *,
    path: str,
    inputs: str,
    labels: str,
    class_names: Optional[Sequence[str]] = None,
  ):
    self._path = paths.absolute(path)
    self._names = (inputs, labels)
    self._class_names = class_names

  def fingerprint(self) -> dict[str, object]:
    """A digest of the file."""
    return {
      "source": "hdf5",
      "digest": _digest(self._path),
      "names": list(self._names),
      "class_names": list(self._class_names or ()),
    }

  def num_items(self) -> Optional[int]:
    """Labels; None where there are none, which `loaders` says."""
    import h5py  # Late: few need it. TensorFlow brings it.

    with contextlib.suppress(OSError), h5py.File(self._path, "r") as file:
      labels = file.get(self._names[1])
      return labels.size if isinstance(labels, h5py.Dataset) else None
    return None

  def loaders(self) -> Iterator[Loader]:
    """Every row, one after the other; keys are the inputs' name and the number.

    Raises:
      UserError: the file can't be read, has no such data set, or they don't fit.
    """
    import h5py  # Late: few need it. TensorFlow brings it.

    try:
      with h5py.File(self._path, "r") as file:
        for name in self._names:
          if not isinstance(file.get(name), h5py.Dataset):
            raise UserError(
              f"{self._path} has no data set {name!r}; it has {', '.join(file)}."
            )
        inputs, labels = (file[name] for name in self._names)
        if h5py.check_string_dtype(labels.dtype):
          labels = labels.asstr()
        for load in _loaders(self._names[0], inputs, labels[()], self._class_names):
          item = load()  # HDF5 does not read side by side.
          yield functools.partial(_give, item)
    except UnicodeDecodeError as error:
      raise UserError(f"{self._path} has a label that is no UTF-8.") from error
    except OSError as error:
      raise UserError(f"{self._path} can't be read as HDF5: {error}.") from error


def _give(item: Item) -> Item:
  return item


def _loaders(
  name: str, inputs: Any, labels: np.ndarray, class_names: Optional[Sequence[str]]
) -> Iterator[Loader]:
  is_image = inputs.dtype == np.uint8 and inputs.ndim in (3, 4)
  if not is_image and (inputs.ndim != 2 or inputs.dtype.kind not in "iuf"):
    raise UserError(
      f"{name} has type {inputs.dtype} and shape {tuple(inputs.shape)}; images must be "
      "uint8 and [N, H, W] or [N, H, W, C], vectors numbers and [N, D]."
    )
  if labels.ndim != 1 or labels.dtype.kind not in "iuOUS":
    raise UserError(
      f"The labels of {name} have type {labels.dtype} and shape {labels.shape}; they "
      "must be [N] integers or text."
    )
  if len(inputs) != len(labels):
    raise UserError(
      f"{name} has {len(inputs)} items and {len(labels)} labels; they must be of the "
      "same data."
    )
  for number in range(len(labels)):
    label = _class_name(labels[number], class_names, f"{name}/{number}")
    yield functools.partial(_load, f"{name}/{number}", label, inputs, number, is_image)


def _load(key: str, label: str, inputs: Any, number: int, is_image: bool) -> Item:
  row = np.asarray(inputs[number])
  if is_image:
    return Item(key, label, encode_png(row))
  return Item(key, label, None, {"vector": row.astype(np.float32)})


def _class_name(label: Any, class_names: Optional[Sequence[str]], key: str) -> str:
  if isinstance(label, bytes):
    return text_of(label, key)
  if isinstance(label, str) or class_names is None:
    return str(label)
  if not 0 <= label < len(class_names):
    raise UserError(
      f"{key} has label {label}, but class_names names only {len(class_names)} classes."
    )
  return class_names[label]


def _file_of(name: str) -> tuple[str, Optional[str]]:
  """Path, and the array's name where it is one of a .npz file."""
  path, colon, array = name.rpartition(":")
  if colon and path.endswith(".npz"):
    return paths.absolute(path), array
  return paths.absolute(name), None


def _load_array(name: str) -> np.ndarray:
  path, array = _file_of(name)
  try:
    if array is None and not paths.is_remote(path):
      loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
      loaded = np.load(io.BytesIO(paths.read_bytes(path)), allow_pickle=False)
    if array is None and isinstance(loaded, np.lib.npyio.NpzFile):
      raise UserError(
        f"{path} is a .npz file; name one of its arrays, {', '.join(loaded)}, as in "
        "'file.npz:name'."
      )
    if array is None:
      return loaded
    _check_has(path, loaded, array)
    return loaded[array]
  except UserError:
    raise
  except _NO_NUMPY_FILE as error:
    reason = getattr(error, "strerror", None) or f"{error}".partition("\n")[0]
    raise UserError(f"{path} can't be read as a NumPy file: {reason}.") from error


def _check_has(path: str, arrays: Mapping[str, Any], name: str) -> None:
  if name not in arrays:
    raise UserError(f"{path} has no array {name!r}; it has {', '.join(arrays)}.")


def _digest(path: str) -> str:
  digest = hashlib.sha256()
  try:
    with paths.open_file(path, "rb") as file:
      while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
  except OSError as error:
    raise UserError(f"{path} can't be read: {error.strerror}.") from error
  return digest.hexdigest()
