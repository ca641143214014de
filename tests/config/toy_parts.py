"""Toy parts and roots for the tests of the config."""

from __future__ import annotations

import gin

ROOTS = ("toy_train", "toy_evaluate")


@gin.register(module="toy")
class ToyLoss:
  def __init__(self, *, margin, squared=False):
    self.margin = margin
    self.squared = squared


@gin.register(module="toy")
class OtherToyLoss:
  def __init__(self, *, scale=1.0):
    self.scale = scale


@gin.register(module="toy")
def toy_decoder(*, height=8):
  return height


@gin.register(module="toy")
class ToyPipeline:
  def __init__(self, index, *, decoder=None, seed=0):
    self.index = index
    self.decoder = decoder
    self.seed = seed


@gin.register(module="toy", denylist=["shape"])
def toy_encoder(*, shape, size):
  return shape, size


@gin.register("Twin", module="toy.first")
def first_twin():
  return 1


@gin.register("Twin", module="toy.second")
def second_twin():
  return 2


@gin.configurable(module="toy")
def toy_train(run, *, loss, steps=10, data=None, encoder=None, actions=()):
  return run, loss, steps, data, encoder, actions


@gin.configurable(module="toy")
def toy_evaluate(*, data, ks=(1, 5)):
  return data, ks
