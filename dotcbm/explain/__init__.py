"""Where a concept was read from, and what follows from it."""
