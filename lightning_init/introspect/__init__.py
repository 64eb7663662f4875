"""What a model is made of: its parameters and their roles, its layers and activations."""
