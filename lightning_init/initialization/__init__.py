"""Which weights a model starts from: fans, gains, schemes, plan, draw, write, report."""
