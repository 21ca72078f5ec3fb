"""Sparse experts in place of a transformer block's MLP: routing, balance, budgets."""
