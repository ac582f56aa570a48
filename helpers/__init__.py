"""Helpers of the series."""
