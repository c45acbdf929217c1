"""Linear algebra on sharded matrices. Does not depend on models, engines or options."""
