"""Configs under the ruler: their programs, and what `resources` says of them."""
