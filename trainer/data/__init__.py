"""From files to replica batches: records, class index, sampler, pipeline."""
