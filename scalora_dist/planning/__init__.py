"""What a run will need, before it is started: memory, bytes on the wire, least times."""
