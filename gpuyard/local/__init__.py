"""The local stack: embedded servers, every part of the service as a process, and the demo."""
