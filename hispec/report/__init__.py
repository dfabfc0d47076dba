"""Everything known about a checkpoint on one HTML page."""
