"""robomimic's algorithms on cached features."""
