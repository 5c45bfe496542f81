"""The commands, one module per group. A command asks the client and prints."""
