"""What a run can be continued from: trees of tensors on disk, and random number generators."""
