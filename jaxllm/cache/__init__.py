"""The KV cache: pages on the host's books, arrays on the device."""
