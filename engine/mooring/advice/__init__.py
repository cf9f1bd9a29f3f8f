"""A quick look at the user's data: which model and which method to begin with, and how sure that is."""
