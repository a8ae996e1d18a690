"""A forward pass of transformers' own code, recorded once and replayed natively on a CPU."""
