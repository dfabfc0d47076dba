"""Base models: which there are, how they are fetched, where they lie."""
