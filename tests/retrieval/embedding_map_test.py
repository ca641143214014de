"""The projector's files, read by TensorBoard's own plugin."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from tensorboard.plugins.projector import projector_plugin
from werkzeug import test as werkzeug_test

from trainer.retrieval import pictures, report_collector
from trainer.retrieval.report_data import EmbeddingMap, Sprite

_EMBEDDINGS = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)


def _sample(sprite=None):
  return EmbeddingMap(
    method="PCA",
    items=[1, 4, 8],
    class_names=["ant", "a\tname\nof lines", ""],
    x=[0.0, 0.5, 1.0],
    y=[0.0, 0.5, 1.0],
    is_mistake=[True, False, None],
    sprite=sprite,
  )


def _sprite() -> Sprite:
  return pictures.sprite(np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6, 1))


class _OneRun(provider.DataProvider):
  """TensorBoard's view of an event folder: one run at the top."""

  def list_runs(self, ctx=None, *, experiment_id):
    return [provider.Run(run_id=".", run_name=".", start_time=0.0)]

  def list_scalars(self, *arguments, **options):
    return {}

  read_scalars = list_tensors = read_tensors = list_scalars
  read_last_scalars = list_blob_sequences = read_blob_sequences = list_scalars
  read_blob = list_scalars


@pytest.fixture
def ask(tmp_path):
  """Returns the response of the plugin to a path, as bytes."""
  plugin = projector_plugin.ProjectorPlugin(
    base_plugin.TBContext(logdir=str(tmp_path), data_provider=_OneRun())
  )

  def answer(route, **query):
    client = werkzeug_test.Client(plugin.get_plugin_apps()[route])
    response = client.get(route, query_string=query)
    assert response.status_code == 200, response.get_data()
    return response.get_data()

  return answer


def test_the_plugin_reads_vectors_metadata_and_sprite(tmp_path, ask):
  report_collector.write_projector(str(tmp_path), _sample(_sprite()), _EMBEDDINGS)
  [info] = json.loads(ask("/info", run="."))["embeddings"]
  assert info["tensorName"] == "embeddings"
  assert info["tensorShape"] == [3, 5]
  assert info["sprite"]["singleImageDim"] == [6, 4]
  tensor = np.frombuffer(ask("/tensor", run=".", name="embeddings"), np.float32)
  np.testing.assert_allclose(tensor.reshape(3, 5), _EMBEDDINGS[[1, 4, 8]], rtol=1e-5)
  lines = ask("/metadata", run=".", name="embeddings").decode().splitlines()
  assert lines == [
    "item\tclass\tnearest",
    "1\tant\twrong",
    "4\ta name of lines\tright",
    "8\t-\tnot asked",
  ]
  sprite = tf.io.decode_png(ask("/sprite_image", run=".", name="embeddings"))
  assert sprite.shape == (8, 12, 1)


def test_no_sprite_without_pictures(tmp_path, ask):
  report_collector.write_projector(str(tmp_path), _sample(), _EMBEDDINGS)
  [info] = json.loads(ask("/info", run="."))["embeddings"]
  assert "sprite" not in info
  assert not (tmp_path / "projector" / "sprite.png").exists()
