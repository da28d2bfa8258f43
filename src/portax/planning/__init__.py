"""Plans: every leaf that a conversion writes, and its sources, checked before a byte moves."""
