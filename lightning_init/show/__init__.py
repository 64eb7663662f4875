"""How statistics reach users: loggers and TensorBoard's event files."""
