"""Weights in memory: a pool that files are read into, what is kept of them, and copies to the device."""
