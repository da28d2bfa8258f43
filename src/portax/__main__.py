"""`python -m portax`."""

from portax.cli import run

run()
