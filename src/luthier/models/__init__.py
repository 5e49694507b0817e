"""Opening a base model with its tokenizer, and attaching the adapter to train."""
