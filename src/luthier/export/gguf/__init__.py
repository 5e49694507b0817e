"""GGUF files and llama.cpp: written, read and proven."""
