"""What a run learns to do."""
