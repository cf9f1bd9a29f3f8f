"""Benchmarks of the ops: declare once, verify, time, record; tables and pictures come from records only."""
