"""What a run folder holds, and what can be done with it without training code."""
