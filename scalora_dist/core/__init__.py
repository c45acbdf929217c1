"""The maths on shards of matrices. Knows no model, engine or option."""
