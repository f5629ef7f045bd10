"""Benchmarks of this project, its peers and limits, measured side by side."""
