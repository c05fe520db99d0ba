"""Measurements: each module is a command, prints a table and writes JSON to `benchmarks/results/`."""
