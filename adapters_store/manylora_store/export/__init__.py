"""Compiled adapters as something else: a mix of them, merged weights, one PEFT folder."""
