"""The fastest setting for a model, a machine and a kind of text."""
