"""The fine-tuning methods: the layers each one adds and its work around an optimizer step."""
