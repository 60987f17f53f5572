"""Pieces become responses and chunks, one module a route."""
