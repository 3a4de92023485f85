"""Micro benchmarks: what a frame, a pick and a count cost the relay."""
