"""From files to replica batches: sources, records, index, samplers and pipeline."""
