"""Honest measurement: accuracy, latency, memory, each with its interval."""
