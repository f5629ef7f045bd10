"""Ours, peers and limits, measured side by side."""
