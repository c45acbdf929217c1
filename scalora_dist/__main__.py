"""``python -m scalora_dist`` is the command ``scalora``, for launchers to start on every rank."""

from scalora_dist.cli import main

if __name__ == "__main__":
    main()
