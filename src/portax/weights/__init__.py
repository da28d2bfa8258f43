"""What a weight is, and how its bytes move."""
