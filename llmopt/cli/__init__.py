"""The command line: parse, call, print. One file a command; nothing heavy is imported before a command runs."""
