"""The public algorithms, re-stated: what a user would otherwise run."""
