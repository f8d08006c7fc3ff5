"""Composes the stages per request."""
