"""Hierarchical speculative decoding: the loop, the ladder, the KV cache, verification."""
