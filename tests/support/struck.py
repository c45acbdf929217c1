"""launch/train.py for a run in which a bit of a weight flips on rank 1 after step 3."""

import sys

from scalora_dist import cli
from scalora_dist.training import trainer
from tests.support.workers.replicas import Struck

if __name__ == "__main__":
    trainer.Trainer = Struck  # type: ignore[misc]
    cli.main(["train", *sys.argv[1:]])
