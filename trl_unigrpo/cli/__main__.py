"""`python -m trl_unigrpo.cli`, as the console command."""

from . import main


main()
