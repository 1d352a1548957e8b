"""Basics that all other packages use: clocks, errors, background tasks."""
