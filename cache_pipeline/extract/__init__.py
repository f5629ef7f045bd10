"""Extracts features of datasets into caches, and verifies them."""
