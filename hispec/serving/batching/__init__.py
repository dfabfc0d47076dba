"""Texts that join a running decode and leave it, on the thread that owns the model."""
