"""Compiles or runs a step exported by TensorFlow, with the XLA of JAX.

This file runs in a separate Python, which has JAX and libtpu but neither TensorFlow nor
this package: `python xla_in_jax.py REQUEST.json ANSWER.json`. Only this file uses JAX's
private names; `launch/tpu_check.txt` pins the versions.

A request gives the program (`hlo`, a file), `num_replicas`, and the `action`: "compile"
for the `topology`, or "run" on virtual CPU devices with the `inputs` (an .npz), whose
first `num_batch_inputs` are divided among the replicas.
"""

import json
import os
import re
import sys
import time

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_NAME = re.compile(r'"([^"]+)"')
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(\w+)>")
_MLIR_TYPES = {"i1": "pred", "i8": "s8", "i32": "s32", "i64": "s64"}

_NUM_LARGEST = 3
_ALIAS = re.compile(r"\{(\d+)\}: \((\d+), \{\}")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_BYTES.update({"f64": 8, "s64": 8, "u64": 8, "c64": 8, "s32": 4, "u32": 4, "f32": 4})
_MLIR_TYPES.update({"ui8": "u8", "ui32": "u32", "ui64": "u64"})


def main(request_file, answer_file):
  """Performs the requested action, and writes the answer."""
  with open(request_file, encoding="utf-8") as file:
    request = json.load(file)
  _set_environment(request["num_replicas"])
  answer = {"compile": _compile, "run": _run}[request["action"]](request)
  with open(answer_file, "w", encoding="utf-8") as file:
    json.dump(answer, file)


def _set_environment(num_replicas):
  """Disables the search for a TPU and divides the CPU, before JAX is imported."""
  os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # No process holds a TPU.
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    XLA_FLAGS=f"--xla_force_host_platform_device_count={num_replicas}",
  )


def _compile(request):
  devices = _devices(request["topology"], request["num_replicas"])
  module = _module(request["hlo"])
  largest = _largest_arrays(module)
  start = time.perf_counter()
  try:
    executable = _compiled(module, devices)
  except Exception as error:
    # XLA's errors have no own class; wrong use of JAX raises another class.
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
      raise
    return {"error": str(error), "largest": largest}
  compile_s = time.perf_counter() - start
  stats = executable.get_compiled_memory_stats()
  costs = executable.cost_analysis()
  costs = costs[0] if isinstance(costs, list) else costs
  return {
    "compile_s": compile_s,
    "largest": largest,
    "arguments_bytes": stats.argument_size_in_bytes,
    "outputs_bytes": stats.output_size_in_bytes,
    "aliased_bytes": stats.alias_size_in_bytes,
    "temporaries_bytes": stats.temp_size_in_bytes,
    "code_bytes": stats.generated_code_size_in_bytes,
    "flops": costs.get("flops", 0.0),
    "bytes_accessed": costs.get("bytes accessed", 0.0),
    "collectives": _collectives(executable),
  }


def _devices(topology, num_replicas):
  """Returns devices of an absent TPU, or virtual CPU devices."""
  import jax
  from jax.experimental import topologies

  if topology is None:
    return jax.devices("cpu")[:num_replicas]
  description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  if len(description.devices) != num_replicas:
    raise ValueError(f"{topology} has {len(description.devices)} devices.")
  return description.devices


def _compiled(module, devices):
  import numpy as np
  from jax._src import compiler
  from jax._src.lib import _jax

  options = compiler.get_compile_options(
    num_replicas=len(devices),
    num_partitions=1,
    device_assignment=np.array([device.id for device in devices]).reshape(-1, 1),
  )
  options.executable_build_options.use_spmd_partitioning = False
  client = devices[0].client
  is_real = client.platform == "cpu"
  do_compile = client.compile_and_load if is_real else client.compile
  return do_compile(
    module, executable_devices=_jax.DeviceList(tuple(devices)), compile_options=options
  )


def _module(hlo_file):
  """Returns the program as StableHLO, without the copies that TensorFlow adds."""
  from jax._src.interpreters import mlir
  from jax._src.lib import _jax
  from jax.extend.mlir import ir

  with open(hlo_file, "rb") as file:
    stablehlo = _jax.mlir.hlo_to_stablehlo(file.read())
  with mlir.make_ir_context():
    module = ir.Module.parse(stablehlo)
    copies = []

    def find(operation):
      if operation.name == "mhlo.copy":
        copies.append(operation)
      return ir.WalkResult.ADVANCE

    module.operation.walk(find)
    for copy in copies:  # A copy is an identity, which libtpu refuses.
      copy.results[0].replace_all_uses_with(copy.operands[0])
      copy.erase()
  return module


def _largest_arrays(module):
  """Returns the largest results of operations, one per name, largest first.

  Broadcasts are excluded, because the compiler never allocates them.
  """
  from jax.extend.mlir import ir

  found: dict = {}

  def measure(operation):
    if operation.name not in ("stablehlo.broadcast_in_dim", "stablehlo.while"):
      name = _NAME.search(str(operation.location))
      for result in operation.results:
        array = _TENSOR.fullmatch(str(result.type))
        if array and name:
          dimensions = array[1].replace("x", ",").strip(",")
          size = _num_bytes(_MLIR_TYPES.get(array[2], array[2]), dimensions)
          if size > found.get(name[1], {"bytes": 0})["bytes"]:
            found[name[1]] = {"name": name[1], "bytes": size, "shape": dimensions}
    return ir.WalkResult.ADVANCE

  module.operation.walk(measure)
  by_size = sorted(found.values(), key=lambda array: -array["bytes"])
  return by_size[:_NUM_LARGEST]


def _collectives(executable):
  """Returns the bytes that each collective of a compiled program sends to a replica.

  Returns None if JAX cannot read the program, as for some for v5p and v6e.
  """
  try:
    text = "\n".join(module.to_string() for module in executable.hlo_modules())
  except Exception as error:
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
      raise
    return None
  return [
    {"name": name, "bytes": sum(_num_bytes(*array) for array in _ARRAY.findall(shape))}
    for shape, name in _COLLECTIVE.findall(text)
  ]


def _num_bytes(dtype, dimensions):
  size = _BYTES.get(dtype, 0)
  for dimension in filter(None, dimensions.split(",")):
    size *= int(dimension)
  return size


def _run(request):
  """Runs the program once, and writes the new values of arguments, [R, ...] each."""
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  devices = _devices(None, request["num_replicas"])
  executable = _compiled(_module(request["hlo"]), devices)
  mesh = Mesh(np.array(devices), ("replica",))
  with np.load(request["inputs"], allow_pickle=False) as file:
    values = [file[f"arr_{number}"] for number in range(len(file.files))]
  jax.config.update("jax_enable_x64", True)
  inputs = []
  for number, value in enumerate(values):
    is_divided = number < request["num_batch_inputs"]
    spec = PartitionSpec("replica") if is_divided else PartitionSpec()
    inputs.append(jax.device_put(value, NamedSharding(mesh, spec)))
  results = executable.execute_sharded(inputs)
  by_output = results.disassemble_into_single_device_arrays()
  text = executable.hlo_modules()[0].to_string()
  updated = {
    argument: np.stack([np.asarray(each) for each in by_output[int(output)]])
    for output, argument in _ALIAS.findall(text.splitlines()[0])
  }
  np.savez(request["outputs"], **updated)
  return {"num_outputs": len(by_output)}


if __name__ == "__main__":
  main(*sys.argv[1:])
