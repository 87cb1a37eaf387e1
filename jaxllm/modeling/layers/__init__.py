"""The layer library. No layer knows a model's name, a mesh or a batch."""
