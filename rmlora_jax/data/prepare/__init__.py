"""Data sets that are fetched and prepared on first use."""
