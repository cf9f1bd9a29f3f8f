"""Starting one run on many machines: hosts -> processes, as a plan that can be printed, and what carries it out."""
