"""Merged twins of a running server: built, measured, chosen, dropped."""
