"""Everything that is looked at: loggers and TensorBoard's event files."""
