"""Learned optimizers beside tuned baselines."""
