"""Drafters: what proposes the tokens that are verified. One file each."""
