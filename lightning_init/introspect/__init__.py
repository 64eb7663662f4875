"""What a model is made of: its parameters and their roles, its layers and activations.

What is known about types of modules, torch's or other libraries', is here, for the wings above to ask for:

- ``torch_roles``, ``normalization``: what their parameters are and what they start with; ``roles`` has the registry;
- ``unit_rules``: how many units their output has, and in which dimension;
- ``layers``: which of them are one layer with everything inside.
"""
