"""The methods of the papers: what each adds to a model and does around a step."""
