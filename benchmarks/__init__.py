"""Measurements: each prints a table and its command; none of them is a test."""
