"""Sources of arrays: NumPy, HDF5 and idx files.

Source of the idx format: http://yann.lecun.com/exdb/mnist.

Shapes: N items, H × W pixels, C channels, D numbers.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import gin
import numpy as np

from trainer.data.sources import reader_process
from trainer.data.sources.source import Item, Loader, Source, encode_png, label_text
from trainer.errors import UserError, reading, short_reason
from trainer.runtime import filesystem

_HDF5_BATCH_BYTES = 4 << 20

_MAGIC_BYTES = 4
_UINT8 = 0x08


@gin.register
class NumpySource(Source):
  """Inputs and labels in two .npy files, or in one .npz file.

  Inputs of type uint8 with 3 or 4 axes are images, [N, H, W] or [N, H, W, C]. Others
  are vectors, [N, D], stored as the feature `vector`.

  Args:
    inputs: path of a .npy file, or "file.npz:name" for an array in a .npz file.
    labels: in the same form; [N] integers or text.
    class_names: names of labels 0, 1, …; None for the labels themselves.
  """

  def __init__(
    self, *, inputs: str, labels: str, class_names: Optional[Sequence[str]] = None
  ):
    self._inputs = inputs
    self._labels = labels
    self._class_names = class_names

  def fingerprint(self) -> dict[str, object]:
    """Returns digests of the files."""
    names = (self._inputs, self._labels)
    return {
      "source": "numpy",
      "arrays": [[name, _digest(_file_of(name)[0])] for name in names],
      "class_names": list(self._class_names or ()),
    }

  def num_items(self) -> int:
    """Returns the number of labels."""
    return _load_array(self._labels).size

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every row; keys are the inputs' file and the row number.

    Raises:
      UserError: a file can't be read, or the arrays don't match.
    """
    inputs, labels = _load_array(self._inputs), _load_array(self._labels)
    _check_fit(self._inputs, inputs, labels)
    is_image = _is_image(inputs.dtype, inputs.ndim)
    for number, label in enumerate(labels):
      key = f"{self._inputs}/{number}"
      yield functools.partial(
        _load, key, label, self._class_names, inputs[number], is_image
      )


@gin.register
class Hdf5Source(Source):
  """Inputs and labels as two data sets of an HDF5 file.

  Args:
    path: path of the file.
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
    self._path = filesystem.absolute(path)
    self._names = (inputs, labels)
    self._class_names = class_names

  def fingerprint(self) -> dict[str, object]:
    """Returns a digest of the file, and the names."""
    return {
      "source": "hdf5",
      "digest": _digest(self._path),
      "names": list(self._names),
      "class_names": list(self._class_names or ()),
    }

  def num_items(self) -> Optional[int]:
    """Returns the number of labels; None without labels, which `loaders` reports."""
    with contextlib.suppress(UserError):
      for header, _ in reader_process.read(read_hdf5, self._path, *self._names):
        return header["num_items"]
    return None

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every row, in order; keys are the inputs' name and number.

    Raises:
      UserError: the file can't be read, lacks a data set, or the two don't match.
    """
    name = self._names[0]
    dtype, shape, is_text = np.dtype(np.uint8), (), False
    for header, parts in reader_process.read(read_hdf5, self._path, *self._names):
      if "num_items" in header:
        dtype, shape = np.dtype(header["dtype"]), tuple(header["shape"])
        is_text = header["is_text"]
        continue
      rows = np.frombuffer(parts[0], dtype).reshape(-1, *shape)
      labels = parts[1:] if is_text else header["labels"]
      is_image = _is_image(dtype, 1 + len(shape))
      for number, (row, label) in enumerate(zip(rows, labels), header["first"]):
        key = f"{name}/{number}"
        yield functools.partial(
          _load, key, label, self._class_names, row, is_image, header["missing"]
        )


def read_hdf5(
  path: str, name: str, inputs: str, labels: str
) -> Iterator[reader_process.Message]:
  """Reads two data sets of an HDF5 file; runs in a reader process.

  Args:
    path: path of the local file.
    name: name of the file, for messages.
    inputs: name of the data set of images or vectors.
    labels: name of the data set of labels.

  Yields:
    First a header with the number of items, type and shape of a row, and whether labels
    are text. Then batches of rows: the header has the number of the first row and
    numeric labels; the byte strings are the rows and text labels.

  Raises:
    UserError: the file is damaged, or the data sets are missing or don't match.
  """
  import h5py

  try:
    with h5py.File(path, "r") as file:
      for each in (inputs, labels):
        _check_dataset(file, each, name)
      yield from _read_hdf5(file[inputs], file[labels], inputs)
  except UserError:
    raise
  except (OSError, RuntimeError, ValueError, TypeError, KeyError, MemoryError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{name} can't be read as HDF5: {reason}.") from error


def _check_dataset(file: Any, dataset: str, name: str) -> None:
  """Raises if a data set is not an array of this file, or has missing parts.

  HDF5 returns zeros for the parts of a virtual data set whose files are missing.
  """
  import h5py

  found = file.get(dataset)
  if not isinstance(found, h5py.Dataset) or found.shape is None:
    raise UserError(f"{name} has no data set {dataset!r}; it has {', '.join(file)}.")
  if found.is_virtual or found.external or found.file.filename != file.filename:
    raise UserError(
      f"{name}: the data set {dataset!r} is stored in other files; copy it into one "
      "file."
    )


def _read_hdf5(inputs: Any, labels: Any, name: str) -> Iterator[reader_process.Message]:
  import h5py

  is_text = labels.dtype.kind == "S" or bool(h5py.check_string_dtype(labels.dtype))
  _check_fit(name, inputs, labels, is_text)
  row_shape = inputs.shape[1:]
  yield (
    {
      "num_items": len(labels),
      "dtype": inputs.dtype.str,
      "shape": row_shape,
      "is_text": is_text,
    },
    (),
  )
  row_bytes = inputs.dtype.itemsize * math.prod(row_shape)
  step = max(1, _HDF5_BATCH_BYTES // max(1, row_bytes))
  missing = _missing_value(inputs)
  missing_label = _missing_value(labels)
  for first in range(0, len(labels), step):
    some = labels[first : first + step].tolist()
    some = [None if each == missing_label else each for each in some]
    texts = [each or b"" for each in some] if is_text else []
    header = {"first": first, "labels": [] if is_text else some, "missing": missing}
    yield header, [inputs[first : first + step].tobytes(), *texts]


def _missing_value(dataset: Any) -> Any:
  """Returns the value that marks missing data by netCDF's convention, or None."""
  for attribute in ("_FillValue", "missing_value"):
    value = np.asarray(dataset.attrs.get(attribute, ())).ravel()
    if value.size == 1:
      return value[0].item()
  return None


def _is_image(dtype: np.dtype, num_axes: int) -> bool:
  return dtype == np.uint8 and num_axes in (3, 4)


def _check_fit(name: str, inputs: Any, labels: Any, is_text: bool = False) -> None:
  is_image = _is_image(inputs.dtype, inputs.ndim)
  if not is_image and (inputs.ndim != 2 or inputs.dtype.kind not in "iuf"):
    raise UserError(
      f"{name} has type {inputs.dtype} and shape {tuple(inputs.shape)}; images must be "
      "uint8 and [N, H, W] or [N, H, W, C], vectors numbers and [N, D]."
    )
  if labels.ndim != 1 or not (is_text or labels.dtype.kind in "iuUS"):
    raise UserError(
      f"The labels of {name} have type {labels.dtype} and shape {labels.shape}; they "
      "must be [N] integers or text."
    )
  if len(inputs) != len(labels):
    raise UserError(
      f"{name} has {len(inputs)} items and {len(labels)} labels; the numbers must be "
      "equal."
    )


def _load(
  key: str,
  label: Any,
  class_names: Optional[Sequence[str]],
  row: np.ndarray,
  is_image: bool,
  missing: Any = None,
) -> Item:
  class_name = _class_name(label, class_names, key)
  row = np.asarray(row)
  if missing is not None and (row == missing).any():
    raise UserError(
      f"{key} has missing values ({missing}); fill them in, or remove the item."
    )
  if is_image:
    return Item(key, class_name, encode_png(row))
  return Item(key, class_name, None, {"vector": _vector(key, row)})


def _vector(key: str, row: np.ndarray) -> np.ndarray:
  """Converts a row to float32.

  Raises:
    UserError: a value is missing (NaN), infinite, or an integer beyond float32.
  """
  with np.errstate(over="ignore"):
    vector = row.astype(np.float32)
  if not np.isfinite(vector).all():
    bad = row[~np.isfinite(vector)][0]
    raise UserError(f"{key} has {bad} in its vector; float32 needs finite values.")
  if row.dtype.kind in "iu" and (np.abs(row.astype(np.float64)) > 2**24).any():
    raise UserError(
      f"{key} has integers above {2**24:,} in its vector, which float32 can't "
      "represent; scale them, or convert them to floats."
    )
  return vector


def _class_name(label: Any, class_names: Optional[Sequence[str]], key: str) -> str:
  if label is None or isinstance(label, (bytes, str)) or class_names is None:
    return label_text(label, key)
  if not 0 <= label < len(class_names):
    raise UserError(
      f"{key} has label {label}, but class_names has only {len(class_names)} names."
    )
  return class_names[label]


def _file_of(name: str) -> tuple[str, Optional[str]]:
  """Returns the path, and the array's name if it is in a .npz file."""
  path, colon, array = name.rpartition(":")
  if colon and path.endswith(".npz"):
    return filesystem.absolute(path), array
  return filesystem.absolute(name), None


def _load_array(name: str) -> np.ndarray:
  path, array = _file_of(name)
  try:
    if array is None and not filesystem.is_remote(path):
      loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
      loaded = np.load(io.BytesIO(filesystem.read_bytes(path)), allow_pickle=False)
    if array is None and isinstance(loaded, np.lib.npyio.NpzFile):
      raise UserError(
        f"{path} is a .npz file; name one of its arrays, {', '.join(loaded)}, as in "
        "'file.npz:name'."
      )
    if array is None:
      return loaded
    _check_array_name(path, loaded, array)
    return loaded[array]
  except UserError:
    raise
  except Exception as error:  # The header is parsed by Python: many error types.
    reason = short_reason(error)
    if "bject arrays" in reason or "Python objects" in reason:
      raise UserError(
        f"{name} holds Python objects (ragged or mixed rows, or None); save it as an "
        "array of numbers or text."
      ) from error
    raise UserError(f"{path} can't be read as a NumPy file: {reason}.") from error


def _check_array_name(path: str, arrays: Mapping[str, Any], name: str) -> None:
  if name not in arrays:
    raise UserError(f"{path} has no array {name!r}; it has {', '.join(arrays)}.")


def _digest(path: str) -> str:
  with reading(path):
    return filesystem.sha256_of(path)


def read_idx(path: str, *, num_axes: int) -> np.ndarray:
  """Reads an idx file of unsigned bytes.

  Args:
    path: path of the file, gzipped if it ends in .gz.
    num_axes: required number of axes.

  Returns:
    uint8 array; only the first axis may be empty.

  Raises:
    UserError: it can't be read, is not such a file, or is damaged.
  """
  content = _read_bytes(path)
  header_bytes = _MAGIC_BYTES + 4 * num_axes
  magic = bytes([0, 0, _UINT8, num_axes])
  if content[:_MAGIC_BYTES] != magic or len(content) < header_bytes:
    raise UserError(
      f"{path} is not an idx file of unsigned bytes with {num_axes} axes."
    )
  shape = struct.unpack(f">{num_axes}I", content[_MAGIC_BYTES:header_bytes])
  record_bytes = math.prod(shape[1:])
  if record_bytes == 0:
    raise UserError(
      f"{path} is damaged: its header declares records of shape {shape[1:]}."
    )
  num_bytes = len(content) - header_bytes
  if num_bytes != shape[0] * record_bytes:
    raise UserError(
      f"{path} is damaged: its header declares {shape[0]} records, but it holds "
      f"{num_bytes // record_bytes} complete ones ({num_bytes} of "
      f"{shape[0] * record_bytes} bytes)."
    )
  return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def num_idx_records(path: str) -> int:
  """Returns the number of records that the header of an idx file declares.

  Raises:
    UserError: it can't be read, or has no header.
  """
  try:
    with filesystem.as_os_errors(path), filesystem.open_file(path, "rb") as file:
      plain = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
      head = plain.read(_MAGIC_BYTES + 4)
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} can't be read: {error}.") from error
  if len(head) < _MAGIC_BYTES + 4:
    raise UserError(
      f"{path} is not an idx file of unsigned bytes: its header is incomplete."
    )
  return int.from_bytes(head[_MAGIC_BYTES:], "big")


def _read_bytes(path: str) -> bytes:
  try:
    content = filesystem.read_bytes(path)
    return gzip.decompress(content) if path.endswith(".gz") else content
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} can't be read: {error}.") from error


@gin.register
class IdxSource(Source):
  """Images and labels in idx files, plain or gzipped.

  Args:
    folder: folder of the files.
    pairs: (images file, labels file) of each part, relative to the folder.
    class_names: names of labels 0, 1, …; None for the numbers themselves.

  Raises:
    UserError: an entry is not a pair, `class_names` is a text, or two labels have the
      same name.
  """

  def __init__(
    self,
    *,
    folder: str,
    pairs: Sequence[tuple[str, str]],
    class_names: Optional[Sequence[str]] = None,
  ):
    if not pairs or any(isinstance(p, str) or len(p) != 2 for p in pairs):
      raise UserError(
        f"IdxSource.pairs={pairs!r} must be pairs of file names: "
        "(('images', 'labels'), ...)."
      )
    if isinstance(class_names, str):
      raise UserError(
        f"IdxSource.class_names={class_names!r} must be a list of names, one per label."
      )
    if class_names is not None and len(set(class_names)) != len(class_names):
      raise UserError(
        "IdxSource.class_names must have a different name for each label."
      )
    self._folder = filesystem.absolute(folder)
    self._pairs = pairs
    self._class_names = class_names

  def fingerprint(self) -> dict[str, object]:
    """Returns names and digests of the files.

    Digests are needed because data sets like MNIST have equal file names and sizes.

    Raises:
      UserError: a file is missing or can't be read.
    """
    names = [name for pair in self._pairs for name in pair]
    return {
      "source": "idx",
      "files": [[name, _digest(self._path(name))] for name in names],
      "class_names": list(self._class_names or ()),
    }

  def num_items(self) -> int:
    """Returns the number of labels, from the headers of their files."""
    return sum(num_idx_records(self._path(labels)) for _, labels in self._pairs)

  def loaders(self) -> Iterator[Loader]:
    """Yields a loader for every image of every pair.

    Yields:
      Loaders of items whose key is the images file and the number in it.

    Raises:
      UserError: a file is missing, truncated or not an idx file, a pair differs in
        length, or a label has no name.
    """
    for images_name, labels_name in self._pairs:
      images = read_idx(self._path(images_name), num_axes=3)
      labels = read_idx(self._path(labels_name), num_axes=1)
      if len(images) != len(labels):
        raise UserError(
          f"{images_name} has {len(images)} images and {labels_name} {len(labels)} "
          f"labels in {self._folder}; the numbers must be equal."
        )
      for number, (image, label) in enumerate(zip(images, labels)):
        where = f"{labels_name}: record {number}"
        name = _class_name(int(label), self._class_names, where)
        yield functools.partial(_load_idx, f"{images_name}/{number}", name, image)

  def _path(self, name: str) -> str:
    """Returns the path of the file, or of its gzipped form if only that exists."""
    path = os.path.join(self._folder, name)
    for candidate in (path, path + ".gz"):
      if filesystem.exists(candidate):
        return candidate
    raise UserError(f"{path} does not exist, neither plain nor as .gz.")


def _load_idx(key: str, label: str, image: np.ndarray) -> Item:
  return Item(key, label, encode_png(image))
