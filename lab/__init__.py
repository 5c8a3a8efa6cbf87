"""Measuring: arms at equal sampled tokens, tables, speed and memory, the predictor against truth."""
