"""A merged twin: the base's modules once more, with one adapter folded into their weights."""
