"""Which devices train together: from flags to a `tf.distribute` strategy."""

from __future__ import annotations

from typing import Optional

import tensorflow as tf
from absl import logging

from trainer.errors import UserError


def make_strategy(
  name: str, *, num_virtual_replicas: Optional[int] = None
) -> tf.distribute.Strategy:
  """The strategy of that name on this machine.

  Args:
    name: "cpu": one replica on the CPU. "mirrored": all local GPUs, or virtual
      replicas. "auto": "mirrored" where there are GPUs or virtual replicas, else
      "cpu".
    num_virtual_replicas: how many replicas to make of the CPU; None for none.

  Returns:
    A strategy; it must be made before TensorFlow has used a device.

  Raises:
    UserError: the name is unknown, or doesn't fit what this machine has.
  """
  if name not in ("auto", "cpu", "mirrored"):
    raise UserError(f"--strategy={name} is not one of auto, cpu, mirrored.")
  if num_virtual_replicas is not None:
    if name == "cpu":
      raise UserError("--strategy=cpu is one replica; --num_virtual_replicas needs mirrored.")
    return _mirrored_on_cpu(num_virtual_replicas)
  gpus = tf.config.list_logical_devices("GPU")
  if name == "mirrored" and not gpus:
    raise UserError(
      "--strategy=mirrored found no GPU; use --num_virtual_replicas=N for CPU replicas."
    )
  if gpus and name != "cpu":
    logging.info("Strategy: mirrored on %d GPUs.", len(gpus))
    return tf.distribute.MirroredStrategy([gpu.name for gpu in gpus])
  logging.info("Strategy: one replica on the CPU.")
  return tf.distribute.OneDeviceStrategy("CPU:0")


def _mirrored_on_cpu(num_replicas: int) -> tf.distribute.Strategy:
  if num_replicas < 1:
    raise UserError(f"--num_virtual_replicas={num_replicas} must be at least 1.")
  cpus = tf.config.list_physical_devices("CPU")
  devices = [tf.config.LogicalDeviceConfiguration()] * num_replicas
  if len(tf.config.get_logical_device_configuration(cpus[0]) or ()) < num_replicas:
    try:
      tf.config.set_logical_device_configuration(cpus[0], devices)
    except RuntimeError as error:
      raise UserError(
        f"--num_virtual_replicas={num_replicas} must be set before TensorFlow uses a device."
      ) from error
  logging.info("Strategy: mirrored on %d virtual CPU replicas.", num_replicas)
  return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])
