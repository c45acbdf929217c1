"""The training loop, and what it needs: data, checkpoint policy, evaluation, results."""
