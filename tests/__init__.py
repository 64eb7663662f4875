"""The tests: one file per source file, multi-process ones in `distributed`."""
