"""Text for people: folded names, tables, timing."""
