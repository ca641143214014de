"""An endless stream of permutations, cut in blocks in which nothing comes twice.

The stream of a row is one keyed permutation of range(n) after the other, cut in blocks
of b. A block may begin in the tail of one permutation and end in the head of the next,
and would then repeat what both have there. So

- for n ≥ 2b, the first b values of the later permutation are put in another order:
  those that the block has already come last. Enough others are there to fill the block,
  and the tail of a permutation is never part of its own first b values, so one step
  back is all that must be known;
- for n < 2b, the same permutation is repeated until it ends together with a block,
  after lcm(n, b) values: any n values in a row are then distinct, and for n < b a block
  has each value ⌊b/n⌋ or ⌈b/n⌉ times.

Any block is computed by itself, for many rows at once.

Shapes: R rows, b values a block.
"""

from __future__ import annotations

import numpy as np

from trainer.data import permutation


def block(
  numbers: np.ndarray, sizes: np.ndarray, keys: np.ndarray, block_size: int
) -> np.ndarray:
  """A block of each row's stream.

  Args:
    numbers: [R] int64 ≥ 0, which block of its stream.
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

  # The window of an epoch is touched by the block that begins before it and by the
  # next; it keeps its order where the epoch begins together with a block.
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
  """The first values of epochs, those last that end the epoch before.

  Args:
    epochs: [R] int64 ≥ 1.
    sizes: [R] int64.
    keys: [R] uint64.
    num_used: [R] int64 below b, how many of the last values of the epoch before are in
      the block that it shares with this one.
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
  """[R, b] bool, which values are among the others of the same row."""
  if values.shape[1] > 32:
    return np.stack([np.isin(*row) for row in zip(values, others)])
  return (values[:, :, None] == others[:, None, :]).any(axis=2)


def _values(
  keys: np.ndarray, epochs: np.ndarray, positions: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
  """[R, b] int64, the raw permutations of epochs [R] or [R, b] at positions [R, b]."""
  epoch_keys = _epoch_keys(keys, epochs if epochs.ndim == 2 else epochs[:, None])
  flat = (
    np.broadcast_to(each, positions.shape).ravel()
    for each in (positions, sizes[:, None], epoch_keys)
  )
  return permutation.permute(*flat).reshape(positions.shape)


def _epoch_keys(keys: np.ndarray, epochs: np.ndarray) -> np.ndarray:
  """uint64 keys of epochs [R, 1] or [R, b]; a row has at most two, in order."""
  first = permutation.mix(keys[:, None], epochs[:, :1])
  rows = np.flatnonzero(epochs[:, -1] != epochs[:, 0])
  if not len(rows):
    return first
  epoch_keys = np.repeat(first, epochs.shape[1], axis=1)
  second = permutation.mix(keys[rows, None], epochs[rows, -1:])
  is_second = epochs[rows] != epochs[rows, :1]
  epoch_keys[rows] = np.where(is_second, second, epoch_keys[rows])
  return epoch_keys
