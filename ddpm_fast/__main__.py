"""`python -m ddpm_fast`: the command line."""

from ddpm_fast.cli import main

main(prog_name="python -m ddpm_fast")
