"""Studies: published experiments that are more than one run."""
