"""What prepares and runs the experiments of the README."""
