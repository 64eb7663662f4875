"""From rules to new weights and their report: plan, draw, write, verify."""
