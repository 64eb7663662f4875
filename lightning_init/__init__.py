"""Start every training run from the right weights, and see whether signal and gradient stay healthy."""
