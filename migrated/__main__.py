"""``python -m migrated``: the same as the ``migrated`` command."""

from migrated.cli.daemon import main

main(prog_name="migrated")
