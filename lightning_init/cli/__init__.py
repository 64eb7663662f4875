"""The command line: LightningCLI with an ``init`` and a ``monitor`` block, and errors of one line."""
