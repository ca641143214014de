"""Augmentations, and their dependence on the row only."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import ingestion
from trainer.data.augment import (
  Augmentation,
  Blur,
  Colour,
  CropAndResize,
  Cutout,
  Flip,
  Rotation,
  RowRandom,
  Shift,
)
from trainer.data.images import ImageDecoder
from trainer.data.pipeline import Batches, Shard
from trainer.data.records import RecordIndex
from trainer.data.samplers import PKSampler
from trainer.data.sources.source import Item, encode_png
from trainer.errors import UserError

_CHANGES = [
  Flip(),
  Colour(brightness=0.3, contrast=0.4, saturation=0.5),
  Cutout(side_fraction=0.4),
  Blur(max_sigma=1.5),
  Shift(pixels=3),
  Rotation(degrees=30),
  CropAndResize(min_area=0.3),
]

_IN_PIPELINE = [Flip(), Blur(max_sigma=0.5), CropAndResize(min_area=0.3)]


def _images(num=8, height=12, width=10):
  rng = np.random.default_rng(0)
  return tf.constant(rng.random((num, height, width, 3)), tf.float32)


def _random(num_rows=8, seed=1, step=5, first_row=0, num_local_rows=None):
  return RowRandom(
    seed,
    tf.constant(step, tf.int64),
    num_rows=num_rows,
    first_row=first_row,
    num_local_rows=num_local_rows or num_rows,
  )


@pytest.mark.parametrize("change", _CHANGES, ids=lambda c: type(c).__name__)
def test_augmentation_keeps_the_shape_and_differs_between_images(change):
  same = tf.repeat(_images(1), 8, axis=0)
  changed = change(same, _random()).numpy()
  assert changed.shape == same.shape
  assert len({image.tobytes() for image in changed}) > 1


@pytest.mark.parametrize("change", _CHANGES, ids=lambda c: type(c).__name__)
def test_augmentation_of_a_row_does_not_depend_on_the_batch(change):
  images = _images()
  whole = change(images, _random()).numpy()
  part = change(images[3:5], _random(first_row=3, num_local_rows=2)).numpy()
  np.testing.assert_array_equal(part, whole[3:5])


@pytest.mark.parametrize("change", _CHANGES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 6}])
def test_augmentation_depends_on_seed_and_step(change, other):
  first, second = change(_images(), _random()), change(_images(), _random(**other))
  assert (first.numpy() != second.numpy()).any()


def test_two_augmentations_of_a_class_draw_independently():
  random = _random(num_rows=1000)
  first, second = random.uniform(1)[0], random.uniform(1)[0]
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
  assert abs(float(tf.reduce_mean(first)) - 0.5) < 0.05


def test_flip_mirrors_half_of_the_images():
  images = _images(200)
  changed = Flip()(images, _random(num_rows=200)).numpy()
  is_flipped = (changed == images.numpy()[:, :, ::-1]).all(axis=(1, 2, 3))
  is_kept = (changed == images.numpy()).all(axis=(1, 2, 3))
  assert (is_flipped ^ is_kept).all()
  assert 70 < is_flipped.sum() < 130


def test_shift_moves_by_whole_pixels_and_fills_with_black():
  images = 0.1 + 0.9 * _images(30)
  changed = Shift(pixels=2)(images, _random(num_rows=30)).numpy()
  padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)))
  moves = set()
  for number in range(30):
    found = [
      (y, x)
      for y in range(5)
      for x in range(5)
      if np.array_equal(changed[number], padded[number, y : y + 12, x : x + 10])
    ]
    assert len(found) == 1
    moves.update(found)
  assert len(moves) > 10
  assert {y for y, _ in moves} == {x for _, x in moves} == set(range(5))


def test_blur_keeps_the_mean_of_a_flat_image_and_smooths_others():
  flat = tf.fill([4, 9, 9, 1], 0.7)
  np.testing.assert_allclose(Blur(max_sigma=2.0)(flat, _random(4)), flat, rtol=1e-5)
  images = _images()
  blurred = Blur(max_sigma=2.0)(images, _random()).numpy()
  assert (blurred.std(axis=(1, 2)) <= images.numpy().std(axis=(1, 2)) + 1e-6).all()


def test_blur_equals_a_gaussian_filter():
  image = np.zeros((1, 21, 21, 1), np.float32)
  image[0, 10, 10] = 1
  random = _random(1)
  sigma = float(random.uniform(1, 0.01, 2.0)[0][0])
  offsets = np.arange(-5, 6)
  line = np.exp(-0.5 * (offsets / sigma) ** 2)
  expected = np.outer(line, line) / line.sum() ** 2
  blurred = Blur(max_sigma=2.0)(tf.constant(image), _random(1)).numpy()
  np.testing.assert_allclose(blurred[0, 5:16, 5:16, 0], expected, atol=1e-6)


def test_zero_rotation_and_full_crop_are_the_identity():
  images = _images()
  np.testing.assert_allclose(
    Rotation(degrees=1e-5)(images, _random()), images, atol=1e-4
  )
  crop = CropAndResize(min_area=1.0, max_stretch=1.0)
  np.testing.assert_allclose(crop(images, _random()), images, atol=1e-4)


def test_rotation_by_a_right_angle_is_exact():
  images = _images(4, 9, 9)
  random = _random(4)
  (angle,) = random.uniform(1, -np.pi, np.pi)
  change = Rotation(degrees=180)
  turned = change(images, _random(4)).numpy()
  # Rotated back by the same angle, the centre is restored up to interpolation.
  assert abs(float(angle[0])) > 0.01
  np.testing.assert_allclose(turned[:, 4, 4], images.numpy()[:, 4, 4], atol=1e-5)


def test_crop_and_resize_shows_a_part_of_a_ramp():
  ramp = tf.tile(tf.linspace(0.0, 1.0, 50)[None, None, :, None], [20, 50, 1, 1])
  cropped = CropAndResize(min_area=0.2)(ramp, _random(20)).numpy()
  slopes = np.diff(cropped[:, 25, :, 0], axis=1).mean(axis=1) * 49
  widths = slopes
  assert (widths > 0.3).all() and (widths <= 1.001).all()
  assert widths.std() > 0.05


def test_cutout_makes_a_square_grey():
  cut = Cutout(side_fraction=0.5)(tf.ones([50, 20, 20, 1]), _random(50)).numpy()
  num_grey = (cut == 0.5).sum(axis=(1, 2, 3))
  assert set(np.unique(cut)) == {0.5, 1.0}
  assert num_grey.max() == 100
  assert num_grey.min() > 0


def test_colour_jitter_of_strength_zero_is_the_identity():
  np.testing.assert_allclose(Colour()(_images(), _random()), _images(), atol=1e-6)


def test_values_stay_between_zero_and_one():
  augmentation = Augmentation(transforms=_CHANGES, seed=0)
  changed = augmentation(_images(), _random()).numpy()
  assert changed.min() >= 0
  assert changed.max() <= 1


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Colour(contrast=2.0), r"Colour\.contrast=2\.0 must be between"),
    (lambda: Cutout(side_fraction=1.0), r"Cutout\.side_fraction=1\.0 must be between"),
    (lambda: Blur(max_sigma=0.0), r"Blur\.max_sigma=0\.0 must be greater"),
    (lambda: Shift(pixels=0), r"Shift\.pixels=0 must be at least"),
    (lambda: Rotation(degrees=0), r"Rotation\.degrees=0 must be greater"),
    (lambda: CropAndResize(min_area=0), r"CropAndResize\.min_area=0 must be"),
    (
      lambda: CropAndResize(min_area=0.5, max_stretch=0.5),
      r"CropAndResize\.max_stretch=0\.5 must be",
    ),
  ],
)
def test_invalid_strengths_are_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("records"))
  rng = np.random.default_rng(0)
  items = [
    Item(str(n), str(n % 6), encode_png(rng.integers(0, 256, (8, 8)).astype(np.uint8)))
    for n in range(30)
  ]
  ingestion.write_records(items, folder, records_per_shard=30, fingerprint={})
  return RecordIndex.open(folder)


def _inputs(index, shard, first_step=0):
  sampler = PKSampler(index, classes_per_batch=4, samples_per_class=2, seed=0)
  batches = Batches(
    index,
    sampler,
    ImageDecoder(height=8, width=8, channels=1),
    augmentation=Augmentation(transforms=_IN_PIPELINE, seed=3),
  )
  dataset = batches.dataset(shard, first_step=first_step)
  num_batches = 3 * shard.num_local_replicas
  return np.stack([batch.inputs.numpy() for batch in dataset.take(num_batches)])


def test_augmented_batches_are_the_same_on_any_number_of_workers(index):
  whole = _inputs(index, Shard(0, 1, 1))
  replicas = _inputs(index, Shard(0, 4, 4)).reshape(whole.shape)
  np.testing.assert_array_equal(replicas, whole)
  workers = [_inputs(index, Shard(number, 1, 2)) for number in range(2)]
  np.testing.assert_array_equal(np.concatenate(workers, axis=1), whole)


def test_augmented_batches_are_the_same_after_a_resume(index):
  whole = _inputs(index, Shard(0, 1, 1))
  resumed = _inputs(index, Shard(0, 1, 1), first_step=1)
  np.testing.assert_array_equal(resumed[:2], whole[1:])


def test_augmentation_changes_the_batches(index):
  assert len(np.unique(_inputs(index, Shard(0, 1, 1)))) > 300
