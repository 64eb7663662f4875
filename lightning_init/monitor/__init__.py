"""What a model does while it trains: layers, hooks, moments, norms, board."""
