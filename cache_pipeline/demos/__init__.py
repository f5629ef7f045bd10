"""robomimic HDF5 files: demos, frames, windows and splits. NumPy and h5py only."""
