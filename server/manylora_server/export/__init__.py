"""Checkpoints made of a base and adapters: merged, written, compared, and the jobs that do it."""
