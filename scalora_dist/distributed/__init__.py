"""The ranks of a run: who they are, whether they live, what stops them, what they draw."""
