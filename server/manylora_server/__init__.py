"""Manylora's server: one quantized base model, many adapters in one batch.

Imports run downward only: ``core`` <- ``model`` <- ``engine`` <- ``api`` <- ``cli``.
"""
