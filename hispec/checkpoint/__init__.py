"""Early-exit checkpoints on disk."""
