"""Reads and writes run folders; needs no training code."""
