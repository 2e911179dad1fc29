"""Pictures of what a run or a sweep has left."""
