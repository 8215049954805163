"""Measurements, always beside a dense baseline in the same run."""
