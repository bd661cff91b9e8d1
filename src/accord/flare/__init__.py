"""Accord between organisations, on NVIDIA FLARE: provisioning, the relays of its jobs, the engine, a site's service."""
