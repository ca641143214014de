"""From files to replica batches: records, class index, schedule, pipeline."""
