"""Goldens, known values, the doctor and the demo: what proves portax, shipped with it."""
