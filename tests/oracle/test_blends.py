"""Blends in real lanes against float32 Hugging Face loops."""
