"""Which backbone, or which checkpoint, has the best features for a task."""
