"""Patches onto concepts by entropic optimal transport."""
