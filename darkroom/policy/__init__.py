"""Decisions only: no I/O, no clock, no torch. The same objects serve and simulate."""
