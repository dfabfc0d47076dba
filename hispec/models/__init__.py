"""Transformers models whose layers can be entered, left and read at any depth."""
