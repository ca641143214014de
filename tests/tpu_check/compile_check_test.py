""""""

from __future__ import annotations

import inspect

import pytest
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.losses import BatchHardTripletLoss
from trainer.losses.objectives import global_negatives
from trainer.models.backbones import ConvNet
from trainer.models.encoder import Encoder
from trainer.tpu_check import compile_check, replica_program
from trainer.tpu_check.compile_check import suggest_changes
from trainer.tpu_check.compiler import Array
from trainer.tpu_check.replica_program import RunStep
from trainer.training.options import StepOptions
from trainer.training.step import TrainStep


@pytest.mark.parametrize(
  ("start", "unit", "limit", "expected"),
  [
    (64, 4, 100, 100),
    (64, 4, 103, 100),
    (64, 4, 63, 60),
    (64, 4, 4, 4),
    (64, 4, 3, None),
    (6, 4, 9, 8),
    (2, 4, 5, 4),
    (8, 8, 10**9, 8 * compile_check.MAX_FACTOR),
    (12, 4, 12 * compile_check.MAX_FACTOR - 1, 12 * compile_check.MAX_FACTOR - 4),
  ],
)
def test_the_largest_multiple_that_fits_is_found(start, unit, limit, expected):
  assert (
    compile_check.largest_fitting_batch(
      lambda number: number <= limit, start, unit=unit
    )
    == expected
  )


def test_only_multiples_are_tried_and_each_once():
  tried = []

  def fits(number):
    tried.append(number)
    return number <= 1000

  assert compile_check.largest_fitting_batch(fits, 64, unit=4) == 1000
  assert len(set(tried)) == len(tried) < 15
  assert not any(number % 4 for number in tried)


_ACTIVATION = Array("encoder/conv_net/conv2d/Relu", 8, "8")
_DISTANCES = Array("MatMul", 8, "8")


def _proposals(largest, *, share=2.0, precision="float32", normalization="none", m=1):
  step = TrainStep(
    encoder=Encoder(
      backbone=ConvNet(filters=(2,), normalization=normalization),
      embedding_size=2,
      precision=precision,
    ),
    loss=BatchHardTripletLoss(margin=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    options=StepOptions(num_micro_batches=m),
  )
  step.create_variables((4, 4, 1))
  run = RunStep(step, (4, 4, 1), num_classes=24, num_samples=4)
  return suggest_changes(run, 2, share, largest)


def _bindings(lines):
  return [line.partition(":")[0] for line in lines]


def test_micro_batches_bfloat16_and_smaller_batches_are_proposed():
  assert _bindings(_proposals([_ACTIVATION])) == [
    "StepOptions.num_micro_batches = 3",
    "Encoder.precision = 'mixed_bfloat16'",
    "PKSampler.classes_per_batch = 12",
  ]


def test_streaming_distances_is_proposed():
  assert _bindings(_proposals([_DISTANCES])) == [
    "BatchHardTripletLoss.rows_per_tile = 128",
    "PKSampler.classes_per_batch = 12",
  ]


@pytest.mark.parametrize(("share", "expected"), [(1.1, 2), (3.0, 4), (9.0, 12)])
def test_more_micro_batches_are_proposed_for_larger_excess(share, expected):
  first = _bindings(_proposals([_ACTIVATION], share=share))[0]
  assert first == f"StepOptions.num_micro_batches = {expected}"


def test_settings_already_in_use_are_not_proposed():
  lines = _proposals([_ACTIVATION], precision="mixed_bfloat16", m=4)
  assert _bindings(lines) == [
    "StepOptions.num_micro_batches = 12",
    "PKSampler.classes_per_batch = 12",
  ]


def test_batch_normalisation_limits_proposals_of_micro_batches():
  assert "uses micro-batches" in _proposals([_ACTIVATION], normalization="batch")[0]
  lines = _proposals([_ACTIVATION], normalization="synchronized_batch")
  assert not [line for line in lines if "num_micro_batches" in line]


def test_smaller_batch_is_not_proposed_at_the_minimum():
  assert "PKSampler" not in " ".join(_proposals([_DISTANCES], share=100.0))


_SHAPE, _NUM_EXAMPLES = (6, 6, 1), 4


def _decode_jpeg(images):
  file = tf.io.encode_jpeg(tf.cast(images[0], tf.uint8))
  first = tf.io.decode_jpeg(file)[0, 0, 0]
  return images * tf.cast(first, tf.float32)


def _run_python(images):
  return tf.ensure_shape(tf.py_function(abs, [images], tf.float32), images.shape)


def _print(images):
  tf.print(images)
  return images


def _transform(images):
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=images,
    transforms=tf.ones([1, 8]),
    output_shape=_SHAPE[:2],
    fill_value=0.0,
    interpolation="BILINEAR",
  )


def _unsupported(function):
  backbone = tf.keras.Sequential([tf.keras.layers.Lambda(function, name="mine")])
  step = TrainStep(
    encoder=Encoder(backbone=backbone, embedding_size=2),
    loss=BatchHardTripletLoss(margin=0.2),
    objective_fn=global_negatives,
    optimizer=tf.keras.optimizers.SGD(0.1),
    mining_statistics=None,
  )
  step.create_variables(_SHAPE)
  batch = Batch(
    tf.TensorSpec([_NUM_EXAMPLES, *_SHAPE]),
    tf.TensorSpec([_NUM_EXAMPLES], tf.int32),
    tf.TensorSpec([_NUM_EXAMPLES]),
    tf.TensorSpec([_NUM_EXAMPLES], tf.int32),
  )
  with pytest.raises(ValueError, match="XLA_CPU_JIT") as caught:
    replica_program.export_program(step, batch, 2)
  return compile_check.find_unsupported_operation(caught.value)


@pytest.mark.parametrize(
  ("function", "operations", "advice"),
  [
    (
      _decode_jpeg,
      ("DecodeJpeg", "EncodeJpeg"),
      "to the dataset's decoder",
    ),
    (_run_python, ("EagerPyFunc",), "Python runs on the host only"),
    (_print, ("StringFormat", "PrintV2"), "(as of tf.print)"),
    (_transform, ("ImageProjectiveTransformV3",), "decoder or augmentation"),
  ],
)
def test_unsupported_operation_is_reported_with_layer_and_line(
  function, operations, advice
):
  refusal = _unsupported(function)
  assert refusal.operation in operations
  assert "/mine/" in refusal.node
  first = inspect.getsourcelines(function)[1]
  file, line = refusal.line.split(", line ")
  assert file == "compile_check_test.py"
  assert first < int(line) < first + 10
  assert advice in str(refusal)
  assert f"in {refusal.node.rpartition('/')[0]}, {refusal.line}" in str(refusal)


def test_unrelated_compiler_error_propagates():
  assert (
    compile_check.find_unsupported_operation(ValueError("Shapes must be equal rank"))
    is None
  )


def test_memory_is_parsed_from_the_compiler_message():
  words = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
    "memory required for HLO temporaries (31.50G) exceeds available HBM (15.75G)."
  )
  assert compile_check.needed_share(words) == 2.0
  assert compile_check.needed_share("INTERNAL: Mosaic failed") is None


def test_compiler_message_is_shortened_to_one_line():
  assert compile_check.shorten_message("INTERNAL:\n  x\n") == "INTERNAL: x"
  assert len(compile_check.shorten_message("x " * 1000)) < 320
