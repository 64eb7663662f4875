"""What a weight is filled with: distributions, variance scaling, structured matrices, gains and fans."""
