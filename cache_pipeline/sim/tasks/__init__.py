"""One scripted expert per task."""
