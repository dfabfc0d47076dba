"""Everything known of a checkpoint on one HTML page."""
