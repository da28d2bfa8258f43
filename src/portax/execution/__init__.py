"""A plan carried out: one compiled program for each group of equal layers."""
