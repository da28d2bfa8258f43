"""What will be written from what, checked before a byte moves."""
