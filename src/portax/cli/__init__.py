"""The portax command."""
