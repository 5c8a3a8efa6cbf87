"""Taken on trust, guarded by tests: attention over trees, loading a model, run folders, pictures."""
