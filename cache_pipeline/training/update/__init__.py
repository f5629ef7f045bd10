"""One optimiser step: gradients, parameter groups, and what is unfrozen when."""
