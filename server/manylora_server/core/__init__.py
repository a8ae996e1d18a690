"""Configuration, errors and the nouns every other layer shares. Imports no torch."""
