"""The command lines: ``migrated`` (the daemon) and ``migratectl`` (its operators)."""
