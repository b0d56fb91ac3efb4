"""Facts that scheduler, workers and client agree on: specs, lifecycle, store, messages, errors."""
