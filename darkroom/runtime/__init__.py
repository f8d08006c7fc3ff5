"""The asyncio and gRPC shell that every service runs in."""
