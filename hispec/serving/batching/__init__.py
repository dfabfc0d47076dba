"""Continuous batching: the texts of all requests in few decodes."""
