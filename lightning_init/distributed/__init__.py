"""The ranks there are, and what each of them holds of a tensor."""
