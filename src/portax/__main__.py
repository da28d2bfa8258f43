"""`python -m portax`."""

from portax.cli.main import run

run()
