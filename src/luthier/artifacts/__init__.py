"""What lies on disk: files, byte ranges, manifests, fingerprints, publishing, and telling what a folder is."""
