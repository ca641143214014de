"""Keyed permutations, and endless streams of them.

Large n: a generalised Feistel network over pairs (left, right) with left < a,
right < b and a·b ≥ n. Each round adds a hash of one half to the other, modulo its size.
The few outputs at or above n are passed through again until they fall below n ("cycle
walking"), which keeps the map one to one. Source: Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002,
https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf.

Small n: the halves would be too small to mix (a chi-squared test of pairs fails below
n = 20). These permutations are drawn from tables of random permutations, with random
cyclic shifts of input and output.

The stream of a row is a sequence of keyed permutations of range(n), cut into blocks of
b values. A block may begin in the tail of one permutation and end in the head of the
next, and would repeat the values that both contain. This is avoided as follows:

- For n ≥ 2b, the first b values of the later permutation are reordered, so that those
  already in the block come last. The remaining values are enough to fill the block. The
  tail of a permutation never overlaps its own first b values, so only the previous
  permutation is needed.
- For n < 2b, the same permutation is repeated until it ends together with a block,
  after lcm(n, b) values. Any n consecutive values are then distinct, and for n < b a
  block has each value ⌊b/n⌋ or ⌈b/n⌉ times.

Each block is computed independently, for many rows at once.

Shapes: R rows, b values per block.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

_MAX_TABLED = 64
# Up to this size there are fewer permutations than table rows: all are listed.
_MAX_LISTED = 6
_TABLES = 1024

# Pairs of values pass a chi-squared test of uniformity (200,000 keys) from n = 50 on.
_NUM_ROUNDS = 6

_U32 = np.uint32
_U64 = np.uint64


def mix(*words: np.ndarray | int) -> np.ndarray:
  """Hashes integers to 64 bits: the finalizer of SplitMix64 after each of them.

  Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014,
  https://doi.org/10.1145/2714064.2660195.

  Args:
    *words: integers or arrays of them, broadcast.

  Returns:
    uint64 of their common shape, at least [1].
  """
  state = np.zeros(1, _U64)
  for word in words:
    state = state + np.asarray(word).astype(_U64) + _U64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> _U64(27))) * _U64(0x94D049BB133111EB)
    state ^= state >> _U64(31)
  return state


def permute(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """Evaluates keyed permutations of range(size).

  Args:
    positions: [n] int64, 0 ≤ position < size.
    sizes: [n] int64 < 2³¹.
    keys: [n] uint64; one permutation for each key and size.

  Returns:
    [n] int64, 0 ≤ value < size.
  """
  is_small = sizes <= _MAX_TABLED
  if is_small.all():
    return _from_tables(positions, sizes, keys)
  if not is_small.any():
    return _walk(positions, sizes, keys)
  values = np.empty(len(sizes), np.int64)
  for mask, permute_fn in ((is_small, _from_tables), (~is_small, _walk)):
    values[mask] = permute_fn(positions[mask], sizes[mask], keys[mask])
  return values


def _from_tables(
  positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray
) -> np.ndarray:
  tables, starts, counts = _tables()
  unsigned = sizes.astype(_U32)
  number = _below(counts[sizes], keys.astype(_U32))
  high = (keys >> _U64(32)).astype(_U32)
  before, after = _below(unsigned, high), _below(unsigned, high << _U32(16))
  turned = _add(positions.astype(_U32), before, unsigned)
  values = tables[starts[sizes] + number * unsigned + turned]
  return _add(values, after, unsigned).astype(np.int64)


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns concatenated permutations of every small size.

  Returns:
    Three uint32 arrays: the permutations; by size, their start; by size, their count.
  """
  blocks = [np.empty((0, 0), np.int64)]
  for size in range(1, _MAX_TABLED + 1):
    if size <= _MAX_LISTED:
      blocks.append(np.array(list(itertools.permutations(range(size)))))
    else:
      hashes = mix(size, np.arange(_TABLES * size)).reshape(_TABLES, size)
      blocks.append(np.argsort(hashes, axis=1))
  starts = np.cumsum([0] + [block.size for block in blocks[:-1]])
  counts = np.array([len(block) for block in blocks])
  flat = np.concatenate([block.ravel() for block in blocks])
  return flat.astype(_U32), starts.astype(_U32), counts.astype(_U32)


def _walk(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
  values = _feistel(positions, sizes, keys)
  walking = np.flatnonzero(values >= sizes)
  while len(walking):
    values[walking] = _feistel(values[walking], sizes[walking], keys[walking])
    walking = walking[values[walking] >= sizes[walking]]
  return values


def _feistel(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """Applies the network; returns [n] int64 in its domain, slightly larger than n."""
  num_left = np.ceil(np.sqrt(sizes)).astype(_U32)
  num_right = np.ceil(sizes / num_left).astype(_U32)
  values = values.astype(_U32)
  left = values // num_right
  right = values - left * num_right
  key = keys.astype(_U32)
  step = (keys >> _U64(32)).astype(_U32) | _U32(1)
  for _ in range(_NUM_ROUNDS // 2):
    left = _add(left, _below(num_left, _hash(right + key)), num_left)
    key = key + step
    right = _add(right, _below(num_right, _hash(left + key)), num_right)
    key = key + step
  return left.astype(np.int64) * num_right + right


def _hash(state: np.ndarray) -> np.ndarray:
  """Returns a 32-bit hash whose upper half is well mixed.

  Source: the finalizer of MurmurHash3 without the shifts that mix the lower half,
  https://github.com/aappleby/smhasher/wiki/MurmurHash3.
  """
  state = state * _U32(0x85EBCA6B)
  state ^= state >> _U32(13)
  state *= _U32(0xC2B2AE35)
  return state


def _below(sizes: np.ndarray, hashes: np.ndarray) -> np.ndarray:
  """Returns uint32 in range(size), size ≤ 2¹⁶, from the upper half of a 32-bit hash."""
  return (hashes >> _U32(16)) * sizes >> _U32(16)


def _add(values: np.ndarray, shift: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """Returns (values + shift) modulo size, for operands below size."""
  total = values + shift
  # If the sum is below size, the difference wraps around to a large number.
  return np.minimum(total, total - sizes)


def distinct_block(
  numbers: np.ndarray, sizes: np.ndarray, keys: np.ndarray, block_size: int
) -> np.ndarray:
  """Returns one block of each row's stream.

  Args:
    numbers: [R] int64 ≥ 0, number of the block in its stream.
    sizes: [R] int64 ≥ 1, the n of each row.
    keys: [R] uint64, one stream for each key and size.
    block_size: b.

  Returns:
    [R, b] int64 with values below the row's n.
  """
  is_small = sizes < 2 * block_size
  if is_small.all():
    return _turning(numbers, sizes, keys, block_size)
  if not is_small.any():
    return _reordered(numbers, sizes, keys, block_size)
  values = np.empty((len(sizes), block_size), np.int64)
  for mask, block_fn in ((is_small, _turning), (~is_small, _reordered)):
    values[mask] = block_fn(numbers[mask], sizes[mask], keys[mask], block_size)
  return values


def _turning(
  numbers: np.ndarray, sizes: np.ndarray, keys: np.ndarray, block_size: int
) -> np.ndarray:
  blocks_per_turn = np.lcm(sizes, block_size) // block_size
  turns = numbers // blocks_per_turn
  starts = (numbers - turns * blocks_per_turn) * block_size
  positions = (starts[:, None] + np.arange(block_size)) % sizes[:, None]
  return _values(keys, turns, positions, sizes)


def _reordered(
  numbers: np.ndarray, sizes: np.ndarray, keys: np.ndarray, block_size: int
) -> np.ndarray:
  starts = numbers * block_size
  epochs = starts // sizes
  starts -= epochs * sizes
  steps = np.arange(block_size)
  positions = starts[:, None] + steps
  is_next = positions >= sizes[:, None]
  positions -= is_next * sizes[:, None]
  values = _values(keys, epochs[:, None] + is_next, positions, sizes)

  # The first b values of an epoch occur in the block that begins before the epoch and
  # in the next one. Their order is kept if the epoch begins together with a block.
  is_ahead = is_next.any(axis=1)
  epochs = epochs + is_ahead
  num_used = epochs * sizes % block_size
  rows = np.flatnonzero((is_ahead | (starts < block_size)) & (num_used > 0))
  if len(rows):
    window = _window(epochs[rows], sizes[rows], keys[rows], num_used[rows], block_size)
    in_window = (positions[rows] < block_size) & (is_next[rows] | ~is_ahead[rows, None])
    reordered = np.take_along_axis(
      window, np.where(in_window, positions[rows], 0), axis=1
    )
    values[rows] = np.where(in_window, reordered, values[rows])
  return values


def _window(
  epochs: np.ndarray,
  sizes: np.ndarray,
  keys: np.ndarray,
  num_used: np.ndarray,
  block_size: int,
) -> np.ndarray:
  """Returns the first values of epochs, those that end the previous epoch last.

  Args:
    epochs: [R] int64 ≥ 1.
    sizes: [R] int64.
    keys: [R] uint64.
    num_used: [R] int64 below b, number of the previous epoch's last values in the block
      that both epochs share.
    block_size: b.

  Returns:
    [R, b] int64.
  """
  steps = np.arange(block_size)
  positions = np.broadcast_to(steps, (len(sizes), block_size))
  head = _values(keys, epochs, positions, sizes)
  tail = _values(keys, epochs - 1, (sizes - block_size)[:, None] + steps, sizes)
  tail[steps < block_size - num_used[:, None]] = -1
  is_used = _is_in_row(head, tail)
  return np.take_along_axis(head, np.argsort(is_used, axis=1, kind="stable"), axis=1)


def _is_in_row(values: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns [R, b] bool, true for values that are among the others of the same row."""
  if values.shape[1] > 32:
    return np.stack([np.isin(*row) for row in zip(values, others)])
  return (values[:, :, None] == others[:, None, :]).any(axis=2)


def _values(
  keys: np.ndarray, epochs: np.ndarray, positions: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
  """Returns [R, b] int64, permutations of epochs [R] or [R, b] at positions [R, b]."""
  epoch_keys = _epoch_keys(keys, epochs if epochs.ndim == 2 else epochs[:, None])
  flat = (
    np.broadcast_to(each, positions.shape).ravel()
    for each in (positions, sizes[:, None], epoch_keys)
  )
  return permute(*flat).reshape(positions.shape)


def _epoch_keys(keys: np.ndarray, epochs: np.ndarray) -> np.ndarray:
  """Returns uint64 keys of epochs [R, 1] or [R, b]; a row has at most two, in order."""
  first = mix(keys[:, None], epochs[:, :1])
  rows = np.flatnonzero(epochs[:, -1] != epochs[:, 0])
  if not len(rows):
    return first
  epoch_keys = np.repeat(first, epochs.shape[1], axis=1)
  second = mix(keys[rows, None], epochs[rows, -1:])
  is_second = epochs[rows] != epochs[rows, :1]
  epoch_keys[rows] = np.where(is_second, second, epoch_keys[rows])
  return epoch_keys
