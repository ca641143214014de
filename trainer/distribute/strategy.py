"""Strategies, and iterators over replica batches.

tf.data tunes itself at intervals that double, up to a minute. Deleting an iterator over
devices waits for the next interval, about as long as the iterator ran. Iterators are
therefore released in a background thread.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Mapping
from typing import Any, Optional

import tensorflow as tf
from absl import logging

from trainer.distribute.cluster import find_cluster, wait_for_workers
from trainer.errors import UserError, check_choice
from trainer.run import Hardware
from trainer.runtime import shutdown, tensorflow_private

_THREADS_PER_DEVICE = 2
_KEYS_PER_STRATEGY = 1_000_000


class ReplicaBatches:
  """Batches for the replicas of a strategy.

  Args:
    strategy: the replicas.
    dataset: yields batches for the replicas of this worker in turn, of static shapes.
  """

  def __init__(self, strategy: tf.distribute.Strategy, dataset: tf.data.Dataset):
    self._held = [iter(strategy.distribute_datasets_from_function(lambda _: dataset))]
    weakref.finalize(self, shutdown.release_in_background, self._held).atexit = False

  @property
  def iterator(self) -> Any:
    """Returns the distributed iterator; do not keep it longer than this object."""
    return self._held[0]


def make_strategy(
  hardware: Hardware, fingerprint: Optional[Mapping[str, str]] = None
) -> tf.distribute.Strategy:
  """Creates the strategy of a run on this machine.

  It must be called before TensorFlow has used a device.

  Args:
    hardware: its `strategy` is one of:
      "cpu": one replica on the CPU;
      "mirrored": all local GPUs, or virtual replicas of the CPU;
      "multi_worker": the local GPUs, or else the CPU, of every worker of `TF_CONFIG` or
        Slurm;
      "tpu": the attached TPU, of one host;
      "auto": "tpu" if one is named, "multi_worker" if there are several workers,
        "mirrored" if there are GPUs or virtual replicas, else "cpu".
    fingerprint: values that must be equal on all workers, by name.

  Returns:
    A strategy.

  Raises:
    UserError: the name is unknown, or does not match the hardware of this machine.
    StalledError: a worker did not arrive.
  """
  name, num_virtual = hardware.strategy, hardware.num_virtual_replicas
  check_choice("--strategy", name, _MAKERS)
  if name in ("cpu", "multi_worker", "tpu") and num_virtual > 1:
    raise UserError(
      f"--strategy={name} ignores --num_virtual_replicas={num_virtual}; use "
      "--strategy=mirrored."
    )
  # TensorFloat-32 computes products to 10 bits, and if it is allowed a TPU computes
  # them in bfloat16. Squared distances would be wrong by a thousandth of the norms. The
  # encoder's `precision` sets what may be less exact.
  tf.config.experimental.enable_tensor_float_32_execution(False)
  return _MAKERS[name](hardware, fingerprint or {})


def _auto(hardware: Hardware, fingerprint: Mapping[str, str]) -> tf.distribute.Strategy:
  if hardware.tpu is not None:
    logging.info("Strategy auto: --tpu is set.")
    return _tpu(hardware, fingerprint)
  cluster = find_cluster(os.environ)
  if cluster is not None and cluster.num_workers > 1:
    logging.info("Strategy auto: %d workers are configured.", cluster.num_workers)
    return make_strategy(
      dataclasses.replace(hardware, strategy="multi_worker"), fingerprint
    )
  if hardware.num_virtual_replicas > 1 or tf.config.list_physical_devices("GPU"):
    return _mirrored(hardware, fingerprint)
  logging.info("Strategy auto: no GPU and no other worker.")
  return _cpu(hardware, fingerprint)


def _cpu(hardware: Hardware, fingerprint: Mapping[str, str]) -> tf.distribute.Strategy:
  del hardware, fingerprint
  logging.info("Strategy: one replica on the CPU.")
  return tf.distribute.OneDeviceStrategy("CPU:0")


def _mirrored(
  hardware: Hardware, fingerprint: Mapping[str, str]
) -> tf.distribute.Strategy:
  del fingerprint
  if hardware.num_virtual_replicas > 1:
    divide_cpu(hardware.num_virtual_replicas)
    logging.info(
      "Strategy: mirrored on %d virtual CPU replicas.", hardware.num_virtual_replicas
    )
    return mirrored_on_cpu(hardware.num_virtual_replicas)
  gpus = tf.config.list_logical_devices("GPU")
  if not gpus:
    raise UserError(
      "--strategy=mirrored found no GPU; set --num_virtual_replicas=N for CPU replicas."
    )
  logging.info("Strategy: mirrored on %d GPUs.", len(gpus))
  return tf.distribute.MirroredStrategy([gpu.name for gpu in gpus])


def _multi_worker(
  hardware: Hardware, fingerprint: Mapping[str, str]
) -> tf.distribute.Strategy:
  cluster = find_cluster(os.environ)
  if cluster is None:
    raise UserError(
      "--strategy=multi_worker needs TF_CONFIG, or several tasks started by Slurm's "
      "srun."
    )
  wait_for_workers(cluster, fingerprint, timeout_s=hardware.worker_timeout_s)
  if cluster.index > 0:
    logging.set_verbosity(logging.WARNING)  # Only the chief logs.
  strategy = tf.distribute.MultiWorkerMirroredStrategy(
    tf.distribute.cluster_resolver.SimpleClusterResolver(
      tf.train.ClusterSpec({"worker": list(cluster.addresses)}),
      task_type="worker",
      task_id=cluster.index,
      rpc_layer="grpc",
    )
  )
  shutdown.current_preemption().coordinate_with(cluster.num_workers - 1)
  # All workers have equally many batches, of static shapes: no need to check each time.
  strategy.extended.experimental_enable_get_next_as_optional = False
  logging.info(
    "Strategy: %d workers with %d replicas; this is worker %d.",
    cluster.num_workers,
    strategy.num_replicas_in_sync,
    cluster.index,
  )
  return strategy


def _tpu(hardware: Hardware, fingerprint: Mapping[str, str]) -> tf.distribute.Strategy:
  """Creates resolver, system and strategy in TensorFlow's order."""
  del fingerprint
  name = hardware.tpu or "local"
  if name != "local":
    raise UserError(
      f"--tpu={name} is another machine, but the TPU's own host must read the batches: "
      "run there, with --tpu=local."
    )
  try:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
    tf.tpu.experimental.initialize_tpu_system(resolver)
  except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"--tpu={name} is not available ({reason[:200]}); run on a machine with an "
      "attached TPU."
    ) from error
  strategy = tf.distribute.TPUStrategy(resolver)
  if strategy.extended.num_hosts > 1:
    raise UserError(
      f"--tpu={name} has {strategy.extended.num_hosts} hosts, but one host must read "
      "all batches: use a TPU with one host."
    )
  logging.info("Strategy: TPU %s, %d cores.", name, strategy.num_replicas_in_sync)
  return strategy


def divide_cpu(num_devices: int) -> None:
  """Splits the CPU into several logical devices, for virtual replicas.

  A collective occupies a thread on each replica until all have joined it. With fewer
  threads than that, eight replicas on two cores wait for each other without end.

  Args:
    num_devices: minimum number of devices.

  Raises:
    UserError: TensorFlow already uses the CPU as fewer devices.
  """
  cpu = tf.config.list_physical_devices("CPU")[0]
  devices = [tf.config.LogicalDeviceConfiguration()] * num_devices
  if len(tf.config.get_logical_device_configuration(cpu) or ()) < num_devices:
    try:
      threads = max(os.cpu_count() or 1, _THREADS_PER_DEVICE * num_devices)
      tf.config.threading.set_inter_op_parallelism_threads(threads)
      tf.config.set_logical_device_configuration(cpu, devices)
    except RuntimeError as error:
      raise UserError(
        f"--num_virtual_replicas={num_devices} must be set before TensorFlow uses a "
        "device; a module that gin imports must create no tensor or model on import."
      ) from error


def mirrored_on_cpu(num_replicas: int) -> tf.distribute.Strategy:
  """Creates a strategy of virtual replicas on the devices of `divide_cpu`.

  Args:
    num_replicas: number of replicas.
  """
  tensorflow_private.number_collectives_from(_KEYS_PER_STRATEGY * num_replicas)
  return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])


_MAKERS = {
  "auto": _auto,
  "cpu": _cpu,
  "mirrored": _mirrored,
  "multi_worker": _multi_worker,
  "tpu": _tpu,
}
