"""The `portax` command."""
