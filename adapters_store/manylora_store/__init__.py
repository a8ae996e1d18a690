"""Adapters as data: formats, validation and compilation. Knows no server."""
