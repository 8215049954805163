"""`python -m lorsa_lens.cli`, for `torchrun -m`."""

from lorsa_lens.cli import app

app()
