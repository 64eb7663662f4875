"""The command line: LightningCLI with two more blocks, and errors of one line."""
