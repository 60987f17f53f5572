"""Pieces become responses and chunks, one module per route."""
