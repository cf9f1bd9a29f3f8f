"""Encoders, classifiers, BatchNorm control, parameter groups, weight EMA and export."""
