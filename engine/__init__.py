"""Taken on trust, guarded by tests: attention over trees, loading, memory, run folders."""
