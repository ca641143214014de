"""What XLA does not compile is told by operation, layer and line."""

from __future__ import annotations

import inspect

import pytest
import tensorflow as tf

from trainer.data.pipeline import Batch
from trainer.losses import BatchHardTripletLoss
from trainer.losses.objectives import global_negatives
from trainer.models.encoder import Encoder
from trainer.tpu_check import compile_check, replica_program
from trainer.training.step import TrainStep

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


def _refusal(function):
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
  return compile_check.refusal_of_lowering(caught.value)


@pytest.mark.parametrize(
  ("function", "operations", "advice"),
  [
    (
      _decode_jpeg,
      ("DecodeJpeg", "EncodeJpeg"),
      "in the dataset's decoder",
    ),
    (_run_python, ("EagerPyFunc",), "Python runs on the host alone"),
    (_print, ("StringFormat", "PrintV2"), "as of tf.print"),
    (_transform, ("ImageProjectiveTransformV3",), "decoder or augmentation"),
  ],
)
def test_an_operation_that_does_not_compile_is_told_with_its_layer_and_line(
  function, operations, advice
):
  refusal = _refusal(function)
  assert refusal.operation in operations
  assert "/mine/" in refusal.node
  first = inspect.getsourcelines(function)[1]
  file, line = refusal.line.split(", line ")
  assert file == "refusals_test.py"
  assert first < int(line) < first + 10
  assert advice in str(refusal)
  assert f"in {refusal.node.rpartition('/')[0]}, {refusal.line}" in str(refusal)


def test_an_error_about_something_else_is_no_refusal():
  assert (
    compile_check.refusal_of_lowering(ValueError("Shapes must be equal rank")) is None
  )


def test_memory_is_read_from_the_words_of_the_compiler():
  words = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
    "memory required for HLO temporaries (31.50G) exceeds available HBM (15.75G)."
  )
  assert compile_check.needed_share(words) == 2.0
  assert compile_check.needed_share("INTERNAL: Mosaic failed") is None


def test_words_of_the_compiler_become_one_line():
  assert compile_check.refusal_of_compiler("INTERNAL:\n  x\n") == "INTERNAL: x"
  assert len(compile_check.refusal_of_compiler("x " * 1000)) < 320
