"""The ranks of a run: process group, watchdog, stop signals and random states."""
