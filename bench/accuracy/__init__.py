"""Accuracy of the methods on real images: which comparisons are made, their records, and the tables drawn from them."""
