"""Reads datasets of several layouts: demos, frames, windows and splits. Imports NumPy and h5py, never torch."""
