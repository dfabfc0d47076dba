"""Checkpoints written anew, and exits written for other tools."""
