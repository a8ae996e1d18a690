"""The files of adapters: immutable, and named by the SHA-256 of their bytes."""
