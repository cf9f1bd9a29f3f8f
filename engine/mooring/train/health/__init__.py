"""What keeps a run honest about itself: non-finite steps, loss spikes, hangs, banks that drift apart, memory."""
