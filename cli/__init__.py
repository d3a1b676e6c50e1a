"""The command line: one file a subcommand, imported when it is used; what it does lives in ``runtime``."""
