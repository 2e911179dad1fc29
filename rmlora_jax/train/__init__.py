"""The trainer: from a config to a folder with checkpoints, metrics and an adapter."""
