"""Imports the modules that register parts with gin, so that configs can name them."""

import trainer.data.augment
import trainer.data.augment_geometry
import trainer.data.class_weights
import trainer.data.compositions
import trainer.data.dataset
import trainer.data.decode
import trainer.data.in_place
import trainer.data.resize
import trainer.data.schedule
import trainer.data.sources
import trainer.data.sources_arrays
import trainer.data.sources_folder
import trainer.data.sources_idx
import trainer.data.sources_manifest
import trainer.data.sources_tables
import trainer.data.split
import trainer.distribute.objective
import trainer.embed
import trainer.evaluate
import trainer.export
import trainer.ingest
import trainer.loop.loop
import trainer.loop.optimizers
import trainer.loop.per_part
import trainer.loop.schedules
import trainer.loop.step
import trainer.losses
import trainer.models.applications
import trainer.models.backbones
import trainer.models.encoder
import trainer.retrieval.clustering
import trainer.retrieval.protocols
import trainer.retrieval.verification
import trainer.train
import trainer.validate  # noqa: F401
