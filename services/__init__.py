"""The services: one folder each, one process each. They never import one another."""
