"""The loop, and what a run needs around it: data, saves, evaluations, results."""
