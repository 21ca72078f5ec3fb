"""Bottlenecks: plain modules from patch features to concepts and classes, one a file."""
