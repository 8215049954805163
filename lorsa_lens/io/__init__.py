"""Lorsas on disk and on the hub."""
