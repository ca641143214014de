"""Which devices train together: from flags to a `tf.distribute` strategy."""

from __future__ import annotations

import tensorflow as tf
from absl import logging

from trainer.errors import UserError
from trainer.run import Hardware


def make_strategy(hardware: Hardware) -> tf.distribute.Strategy:
  """The strategy that a run asks for, on this machine.

  It must be made before TensorFlow has used a device.

  Args:
    hardware: its `strategy` is one of:
      "cpu": one replica on the CPU;
      "mirrored": all local GPUs, or virtual replicas of the CPU;
      "auto": "mirrored" where there are GPUs or virtual replicas, else "cpu".

  Returns:
    A strategy.

  Raises:
    UserError: the name is unknown, or doesn't fit what this machine has.
  """
  name, num_virtual = hardware.strategy, hardware.num_virtual_replicas
  if name not in ("auto", "cpu", "mirrored"):
    raise UserError(f"--strategy={name} is not one of auto, cpu, mirrored.")
  if name == "cpu" and num_virtual > 1:
    raise UserError(
      f"--strategy=cpu is one replica; --num_virtual_replicas={num_virtual} needs "
      "mirrored."
    )
  if num_virtual > 1:
    return _mirrored_on_cpu(num_virtual)
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
  cpus = tf.config.list_physical_devices("CPU")
  devices = [tf.config.LogicalDeviceConfiguration()] * num_replicas
  if len(tf.config.get_logical_device_configuration(cpus[0]) or ()) < num_replicas:
    try:
      tf.config.set_logical_device_configuration(cpus[0], devices)
    except RuntimeError as error:
      raise UserError(
        f"--num_virtual_replicas={num_replicas} must be set before TensorFlow uses a "
        "device."
      ) from error
  logging.info("Strategy: mirrored on %d virtual CPU replicas.", num_replicas)
  return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])
