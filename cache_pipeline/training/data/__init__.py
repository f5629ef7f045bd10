"""What a run trains on: rows, their order, and where features come from."""
