"""One module per layout of datasets on disk."""
