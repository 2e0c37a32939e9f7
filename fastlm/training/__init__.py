"""The trainer: its settings, a run's state and checkpoints, its step, its loop, and what listens to it."""
