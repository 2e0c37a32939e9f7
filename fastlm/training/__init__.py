"""The trainer: its configuration, its loop, its checkpoints, its curves."""
