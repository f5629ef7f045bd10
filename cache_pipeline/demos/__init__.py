"""Reads robomimic HDF5 files: demos, frames, windows and splits. Imports NumPy and h5py, never torch."""
