"""A converted model made to talk."""
