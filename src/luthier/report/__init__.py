"""What a run leaves to be read: its metrics, its page and its model card. Reads files; never imports torch."""
