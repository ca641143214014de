"""Losses mined inside the batch: pure functions of tensors, no strategy, no gin call."""
