"""Measuring: arms at equal sampled tokens, speed and memory, the predictor against truth."""
