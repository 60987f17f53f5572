"""The contract in types: requests are pydantic models (strict), responses are msgspec structs (fast to encode)."""
