"""Knows which models exist, which replicas are up, and what each holds."""
