"""Exported models equal the encoder and need only TensorFlow."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.thorough import thorough_except
from trainer import task
from trainer.cli.export import Export, check_error
from trainer.data.images import ImageDecoder, VectorDecoder
from trainer.errors import UserError
from trainer.models.backbones import ConvNet, Perceptron
from trainer.models.encoder import Encoder
from trainer.serving import saved_model
from trainer.training.checkpoint import Checkpoints

_DIGITS = "configs/runs/digits.gin"


def _encoder():
  encoder = Encoder(
    backbone=ConvNet(filters=(32, 64)), embedding_size=64, pooling="generalized_mean"
  )
  encoder.create_variables((8, 8, 1))
  return encoder


@pytest.fixture(scope="module")
def encoder():
  return _encoder()


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
  folder = tmp_path_factory.mktemp("export")
  decoder = ImageDecoder(height=8, width=8, channels=1)
  saved_model.save_saved_model(encoder, decoder, str(folder), fixed_batch_size=3)
  return folder


def _pixels(num_images=3):
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (num_images, 8, 8, 1)).astype(np.uint8)


def _wanted(encoder, pixels):
  return encoder(pixels.astype(np.float32) / 255.0).numpy()


@pytest.mark.parametrize("name", ["serving_default", "serving_default_fixed"])
def test_exported_model_embeds_tensors_like_the_encoder(encoder, folder, name):
  pixels = _pixels()
  model = tf.saved_model.load(str(folder / "saved_model"))
  inputs = tf.constant(pixels, tf.float32) / 255.0
  got = model.signatures[name](inputs=inputs)["embeddings"]
  np.testing.assert_allclose(got, _wanted(encoder, pixels), atol=1e-6)


@pytest.mark.parametrize("name", ["images", "images_fixed"])
def test_exported_model_embeds_image_files_like_their_pixels(encoder, folder, name):
  pixels = _pixels()
  files = tf.stack([tf.io.encode_png(image) for image in pixels])
  model = tf.saved_model.load(str(folder / "saved_model"))
  got = model.signatures[name](files=files)["embeddings"]
  np.testing.assert_allclose(got, _wanted(encoder, pixels), atol=1e-6)


def test_shapes_are_fixed_on_request(folder):
  signatures = tf.saved_model.load(str(folder / "saved_model")).signatures
  shapes = {
    name: signatures[name].structured_outputs["embeddings"].shape.as_list()
    for name in ("serving_default", "serving_default_fixed", "images_fixed")
  }
  assert shapes == {
    "serving_default": [None, 64],
    "serving_default_fixed": [3, 64],
    "images_fixed": [3, 64],
  }


def test_exported_script_needs_only_tensorflow(encoder, folder, tmp_path):
  pixels = _pixels()
  paths = [str(tmp_path / f"{n}.png") for n in range(len(pixels))]
  for path, image in zip(paths, pixels):
    tf.io.write_file(path, tf.io.encode_png(image))
  (tmp_path / "no image.png").write_bytes(b"text")
  asked = [*paths, str(tmp_path / "no image.png"), str(tmp_path / "missing.png")]
  # The package can't be imported: -I ignores the folder and the environment, and
  # the installed package is hidden.
  program = (
    "import sys; sys.modules['trainer'] = None; sys.modules['tf_keras'] = None\n"
    f"sys.argv = {['embed_images.py', *asked]!r}\n"
    f"import runpy; runpy.run_path({str(folder / 'embed_images.py')!r}, "
    "run_name='__main__')"
  )
  done = subprocess.run(
    [sys.executable, "-I", "-c", program], capture_output=True, text=True
  )
  assert done.returncode == 1, done.stderr
  answers = [json.loads(line) for line in done.stdout.splitlines()]
  assert [answer["image"] for answer in answers] == asked
  got = [answer["embedding"] for answer in answers[:3]]
  np.testing.assert_allclose(got, _wanted(encoder, pixels), atol=1e-6)
  assert all(answer["error"] for answer in answers[3:])


def test_tensorflow_lite_model_equals_the_encoder(encoder, folder, tmp_path):
  path = saved_model.save_lite(str(folder / "saved_model"), str(tmp_path))
  runner = tf.lite.Interpreter(model_path=path).get_signature_runner()
  pixels = _pixels(1)
  got = runner(inputs=pixels.astype(np.float32) / 255.0)["embeddings"]
  np.testing.assert_allclose(got, _wanted(encoder, pixels), atol=1e-5)


def test_vectors_have_no_signature_for_images(tmp_path):
  encoder = Encoder(backbone=Perceptron(hidden_units=(4,)), embedding_size=2)
  encoder.create_variables((5,))
  path = saved_model.save_saved_model(encoder, VectorDecoder(size=5), str(tmp_path))
  assert set(tf.saved_model.load(path).signatures) == {"serving_default"}
  assert not (tmp_path / "embed_images.py").exists()


def _task(model_dir, data, *params, mode="export"):
  arguments = [f"--mode={mode}", f"--gin_file={_DIGITS}", f"--model_dir={model_dir}"]
  params = [f"DATA_DIR = '{data}'", *params]
  return task.main(["trainer", *arguments, *(f"--gin_param={p}" for p in params)])


def test_model_card_has_the_hash_of_each_file(tmp_path, capsys):
  data = tmp_path / "data"
  assert _task(tmp_path / "unused", data, mode="ingest") == 0
  run = tmp_path / "run"
  checkpoints = Checkpoints(model_dir=str(run), encoder=_encoder())
  checkpoints.save(3)
  checkpoints.wait()
  assert _task(run, data) == 0
  card = (run / "export" / "MODEL_CARD.md").read_text()
  assert "Maps float32 inputs of shape [8, 8, 1], images with values in [0, 1]" in card
  assert "| steps | 3 |" in card
  assert "run --mode=evaluate after step 3" in card
  model = (run / "export" / "saved_model" / "saved_model.pb").read_bytes()
  assert f"saved_model.pb | {hashlib.sha256(model).hexdigest()} |" in card
  assert "| checkpoint | newest |" in card
  config = (run / "export" / "config.gin").read_bytes()
  assert f"config.gin | {hashlib.sha256(config).hexdigest()} |" in card
  assert config.startswith(b"# Hash: ")
  assert str(run / "export" / "saved_model") in capsys.readouterr().out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A folder with a run, its records and both kinds of exported models."""
  folder = tmp_path_factory.mktemp("exported")
  assert _task(folder / "unused", folder / "data", mode="ingest") == 0
  Checkpoints(model_dir=str(folder / "run"), encoder=_encoder()).save(3)
  params = ("export.formats = ('saved_model', 'tflite')", "export.fixed_batch_size = 5")
  assert _task(folder / "run", folder / "data", *params) == 0
  return folder


def _content(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.mark.parametrize(
  ("spoilt", "words"),
  thorough_except(
    [("_embed_files_fn", "Signature images gives")],
    [
      ("_embed_files_fn", "Signature images gives"),
      ("_embed_inputs_fn", "Signature serving_default"),
    ],
  ),
)
def test_export_that_fails_its_check_replaces_nothing(
  exported, monkeypatch, capsys, spoilt, words
):
  before = _content(exported / "run" / "export")
  make = getattr(saved_model, spoilt)
  monkeypatch.setattr(
    saved_model, spoilt, lambda encoder, given: make(_longer(encoder), given)
  )
  assert _task(exported / "run", exported / "data") == 2
  assert words in capsys.readouterr().err
  assert _content(exported / "run" / "export") == before


def _longer(encoder):
  return lambda inputs, training: encoder(inputs, training=training) * (1.0 + 1e-4)


def test_files_of_the_previous_export_are_removed(exported):
  assert (exported / "run" / "export" / "encoder.tflite").exists()
  assert _task(exported / "run", exported / "data") == 0
  names = {path.name for path in (exported / "run" / "export").iterdir()}
  assert names == {"saved_model", "embed_images.py", "config.gin", "MODEL_CARD.md"}


@pytest.mark.parametrize("error", [2e-6, float("nan")])
def test_too_large_an_error_is_refused(error):
  with pytest.raises(UserError, match=r"^x gives embeddings that differ by"):
    check_error("x", error, 1e-6)


def test_run_without_a_checkpoint_is_refused(tmp_path, capsys):
  assert _task(tmp_path / "unused", tmp_path / "data", mode="ingest") == 0
  assert _task(tmp_path / "empty", tmp_path / "data") == 2
  assert "has no checkpoint; run --mode=train first" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("options", "words"),
  [({"formats": ("onnx",)}, "'onnx'"), ({"fixed_batch_size": 0}, "fixed_batch_size")],
)
def test_unsupported_exports_are_refused(options, words):
  with pytest.raises(UserError, match=words):
    Export(**options)
