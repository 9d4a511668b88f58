"""`python -m ddpm_fast`: the command line."""

from .cli import main

main(prog_name="python -m ddpm_fast")
