"""Running plans: one compiled program for each group of equal layers."""
