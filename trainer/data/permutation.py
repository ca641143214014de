"""Keyed permutations of range(n): any position by itself, for many keys and sizes.

Large n: a generalised Feistel network over pairs (left, right) with left < a,
right < b and a·b ≥ n: each round adds a hash of one half to the other, modulo its size.
The few values that come out at n or above go through again until they fall below
("cycle walking"), which keeps the map one to one. Source: Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", 2002,
https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf.

Small n: the halves would be too small to mix (a chi-squared test of pairs fails below
n = 20), so these are drawn from tables of random permutations, turned by random amounts
before and after.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

_MAX_TABLED = 64
# Up to this size there are fewer permutations than a table has: all are listed.
_MAX_LISTED = 6
_TABLES = 1024

# Pairs of values are uniform to a chi-squared test of 200,000 keys from n = 50 on.
_NUM_ROUNDS = 6

_U32 = np.uint32
_U64 = np.uint64


def mix(*words: np.ndarray | int) -> np.ndarray:
  """A 64-bit hash of integers: the finalizer of SplitMix64 after each of them.

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
  """What stands at positions of keyed permutations of range(size).

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
  """Permutations of every small size, end to end.

  Returns:
    uint32: the permutations; by size, where those of that size start; how many.
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
  """[n] int64, of the network's own domain, which is a little larger."""
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
  """A 32-bit hash whose upper half is good.

  Source: the finalizer of MurmurHash3 without the shifts that serve the lower half,
  https://github.com/aappleby/smhasher/wiki/MurmurHash3.
  """
  state = state * _U32(0x85EBCA6B)
  state ^= state >> _U32(13)
  state *= _U32(0xC2B2AE35)
  return state


def _below(sizes: np.ndarray, hashes: np.ndarray) -> np.ndarray:
  """uint32 in range(size), size ≤ 2¹⁶, from the upper half of a 32-bit hash."""
  return (hashes >> _U32(16)) * sizes >> _U32(16)


def _add(values: np.ndarray, shift: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """(values + shift) modulo size, of numbers below size."""
  total = values + shift
  # Below size the difference wraps round to a large number.
  return np.minimum(total, total - sizes)
