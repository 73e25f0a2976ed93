"""Training: schedules, checkpoints and the loops that use them."""
