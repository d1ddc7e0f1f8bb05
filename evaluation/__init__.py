"""Configs under measurement: their programs, rows, curves, budgets and quality."""
