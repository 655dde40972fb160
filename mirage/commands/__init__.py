"""The subcommands of ``mirage`` that have no package of their own. Each imports what it needs when it runs."""
