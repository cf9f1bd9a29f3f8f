"""Fine-tuning methods, each importable alone: ``from mooring.methods.dr_tune import DRTune``."""
