"""Benchmarks; run them as modules from the project root."""
