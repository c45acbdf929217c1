"""``scalora compare``: a study of methods, with learning rates tuned for each of them."""
