"""The miner, from records to a round: embedded records and detected copies."""

from __future__ import annotations

import types

import numpy as np
import pytest
import tensorflow as tf

from trainer.cli.ingest import ingest
from trainer.data import ingestion
from trainer.data.dataset import Dataset, ListSplit
from trainer.data.images import VectorDecoder
from trainer.data.sources.arrays import NumpySource
from trainer.data.sources.source import Item
from trainer.errors import UserError
from trainer.losses import InfoNCELoss
from trainer.mining import corpus
from trainer.mining.mined_examples import ExampleMining, MislabelledFilter, RankWindow
from trainer.mining.miner import Miner, corpus_fingerprint
from trainer.retrieval.ground_truth import RecordItems

_NUM_RECORDS, _NUM_CLASSES, _SIZE = 90, 6, 4
_COPIES = ((3, 40), (17, 18), (55, 80))


def _data():
  rng = np.random.default_rng(3)
  labels = np.arange(_NUM_RECORDS) % _NUM_CLASSES
  vectors = rng.standard_normal((_NUM_RECORDS, _SIZE)).astype(np.float32)
  for one, other in _COPIES:
    vectors[other] = vectors[one]
  return vectors, labels


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  folder = tmp_path_factory.mktemp("vectors")
  vectors, labels = _data()
  np.savez(folder / "data.npz", x=vectors, y=labels)
  source = NumpySource(
    inputs=f"{folder / 'data.npz'}:x", labels=f"{folder / 'data.npz'}:y"
  )
  ingest(source=source, folder=str(folder / "records"))
  return Dataset(
    folder=str(folder / "records"),
    split=ListSplit(evaluation_classes=("5",)),
    decoder=VectorDecoder(size=_SIZE),
  )


def _identity():
  """Returns an encoder with known embeddings."""
  inputs = tf.keras.Input([_SIZE])
  return tf.keras.Model(inputs, tf.keras.layers.Activation("linear")(inputs))


def _mine(dataset, step=7, **options):
  examples = ExampleMining(window=RankWindow(first=1, last=60))
  miner = Miner(**{"examples": examples, "global_batch_size": 32, **options})
  return miner.mine(miner.embedder(_identity(), dataset), dataset, step)


def _vectors(dataset):
  records = dataset.index.read(np.arange(_NUM_RECORDS))
  return dataset.decoder(tf.constant(records)).numpy()


def test_records_with_equal_decoded_inputs_have_the_same_hash(dataset):
  found = corpus.content_hashes(
    dataset.index, np.arange(_NUM_RECORDS), features=dataset.decoder.features
  )
  vectors = _vectors(dataset)
  is_alike = (vectors[:, None] == vectors[None]).all(axis=2)
  assert is_alike.sum() == _NUM_RECORDS + 2 * len(_COPIES)
  np.testing.assert_array_equal(found[:, None] == found[None], is_alike)


def test_round_has_only_records_of_the_training_classes_and_no_copies(dataset):
  arrays = _mine(dataset, num_class_neighbours=2).arrays
  labels, vectors = dataset.index.labels, _vectors(dataset)
  is_training = np.isin(labels, dataset.train_classes)
  np.testing.assert_array_equal(arrays["anchors"], np.flatnonzero(is_training))
  for anchor, positives, negatives in zip(
    arrays["anchors"], arrays["positives"], arrays["negatives"]
  ):
    negatives = negatives[negatives >= 0]
    allowed = is_training & (labels != labels[anchor])
    allowed &= (vectors != vectors[anchor]).any(axis=1)
    distances = np.linalg.norm(vectors[allowed] - vectors[anchor], axis=1)
    expected = np.sort(distances)[: len(negatives)]
    got = np.linalg.norm(vectors[negatives] - vectors[anchor], axis=1)
    assert len(negatives) == min(60, allowed.sum())
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert allowed[negatives].all()
    assert (labels[positives] == labels[anchor]).all()
    assert (positives != anchor).all()
  assert arrays["class_neighbours"].shape == (dataset.index.num_classes, 2)
  means = np.stack([vectors[labels == c].mean(axis=0) for c in dataset.train_classes])
  order = np.argsort(np.linalg.norm(means[:, None] - means[None], axis=2), axis=1)
  np.testing.assert_array_equal(
    arrays["class_neighbours"][dataset.train_classes],
    dataset.train_classes[order[:, 1:3]],
  )


def _of_items(folder, bad_records="refuse"):
  """Writes records with an undecoded number each; the last may have no vector."""
  vectors, labels = _data()
  items = [
    Item(str(n), str(label), features={"vector": vector, "number": n})
    for n, (vector, label) in enumerate(zip(vectors, labels))
  ]
  if bad_records == "replace":
    items[-1] = items[-1]._replace(features={"number": 0})
  ingestion.write_records(items, str(folder), records_per_shard=50, fingerprint={})
  return Dataset(
    folder=str(folder),
    split=ListSplit(evaluation_classes=("3",)),
    decoder=VectorDecoder(size=_SIZE),
    bad_records=bad_records,
  )


def test_copies_are_detected_by_decoded_inputs_only(tmp_path):
  mined = _mine(_of_items(tmp_path))
  num_copies = np.isin(_COPIES, np.flatnonzero(_data()[1] != 3)).all(axis=1).sum()
  assert num_copies > 0
  assert mined.metadata["counts"]["with_copy_of_another_label"] == 2 * num_copies


def test_bad_record_is_mined_as_its_replacement(tmp_path, caplog):
  dataset = _of_items(tmp_path, "replace")
  bad = _NUM_RECORDS - 1
  instead = bad % _NUM_CLASSES  # The next of its class, cyclically, is the first.
  arrays = _mine(dataset).arrays
  lists = [
    np.r_[anchor, row] for anchor, row in zip(arrays["anchors"], arrays["negatives"])
  ]
  assert "records-00001.tfrecord: record 39 can't be decoded" in caplog.text
  both = [
    {bad, instead} & set(each[1:]) for each in lists if each[0] not in (bad, instead)
  ]
  assert any(each == {bad, instead} for each in both)
  of = {anchor: row for anchor, row in zip(arrays["anchors"], arrays["positives"])}
  assert instead not in of[bad]
  assert bad not in of[instead]
  with pytest.raises(UserError, match="can't be decoded"):
    refusing = Dataset(
      folder=str(tmp_path),
      split=ListSplit(evaluation_classes=("3",)),
      decoder=dataset.decoder,
    )
    _mine(refusing)


def test_replicas_mine_the_same_examples(dataset, mirrored):
  one = _mine(dataset, num_class_neighbours=2).arrays
  with mirrored(2).scope():
    two = _mine(dataset, num_class_neighbours=2).arrays
  assert one.keys() == two.keys()
  for name, array in one.items():
    np.testing.assert_array_equal(two[name], array, err_msg=name)


def test_sample_differs_between_rounds(dataset):
  rounds = [_mine(dataset, step, records_per_class=5) for step in (7, 8, 7)]
  used = [set(each.arrays["anchors"]) for each in rounds]
  assert [len(each) for each in used] == [25, 25, 25]
  assert used[0] == used[2] != used[1]
  assert rounds[0].metadata["counts"]["items"] == 25


def test_suspected_records_are_named_by_key(dataset):
  examples = ExampleMining(
    window=RankWindow(first=1, last=5),
    mislabelled=MislabelledFilter(num_neighbours=1, min_fraction=1.0),
  )
  metadata = _mine(dataset, examples=examples).metadata
  assert (
    0
    < metadata["counts"]["suspected_mislabelled"]
    == len(metadata["suspected_mislabelled"])
  )
  keys = set(RecordItems(dataset.index, np.arange(_NUM_RECORDS)).names())
  assert set(metadata["suspected_mislabelled"]) < keys


def test_training_classes_are_part_of_the_data_fingerprint(dataset):
  same = corpus_fingerprint(dataset)
  other = type(dataset)(
    folder=dataset.folder,
    split=ListSplit(evaluation_classes=("4",)),
    decoder=dataset.decoder,
  )
  different = {
    name for name, fact in corpus_fingerprint(other).items() if fact != same[name]
  }
  assert different == {"the hash of the training classes"}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"examples": None}, "nothing to mine"),
    ({"records_per_class": 0}, "records_per_class=0"),
    ({"num_class_neighbours": -1}, "num_class_neighbours=-1 must be at least 0"),
    ({"global_batch_size": 0}, "global_batch_size=0 must be at least 1"),
    ({"index_kind": "best"}, "index_kind='best' must be one of auto"),
  ],
)
def test_invalid_miner_is_refused(dataset, options, message):
  with pytest.raises(UserError, match=message):
    _mine(dataset, **options)


def test_decoder_without_declared_features_is_refused_before_mining():
  dataset = types.SimpleNamespace(decoder=types.SimpleNamespace(shape=(3,)))
  Miner(num_class_neighbours=1).check(dataset)
  with pytest.raises(UserError, match="needs an attribute `features`"):
    Miner(examples=object()).check(dataset)


def test_nonfinite_embeddings_are_reported(dataset):
  inputs = tf.keras.Input([_SIZE])
  encoder = tf.keras.Model(inputs, tf.keras.layers.Lambda(lambda x: x / 0.0)(inputs))
  miner = Miner(num_class_neighbours=1)
  with pytest.raises(UserError, match="embeddings are not finite"):
    miner.mine(miner.embedder(encoder, dataset), dataset, 0)


def test_neighbours_by_centres_need_a_loss_with_centres(dataset):
  step = types.SimpleNamespace(encoder=_identity(), loss=InfoNCELoss(temperature=0.1))
  miner = Miner(num_class_neighbours=1, class_vectors="centres")
  with pytest.raises(UserError, match="needs a loss with class centres"):
    miner.make_mine_fn(step, dataset)


def test_examples_are_mined_together_with_neighbours_by_centres(dataset):
  centres = np.eye(5, _SIZE)[:, None] + 0.1
  miner = Miner(
    examples=ExampleMining(window=RankWindow(first=1, last=60)),
    num_class_neighbours=1,
    class_vectors="centres",
  )
  embedder = miner.embedder(_identity(), dataset)
  found = miner.mine(embedder, dataset, 7, centres).arrays
  np.testing.assert_array_equal(found["anchors"], _mine(dataset).arrays["anchors"])
  assert (found["class_neighbours"][dataset.train_classes] >= 0).all()
