"""Symbolic rules: record what a learned optimizer does, and distil it into a short equation."""
