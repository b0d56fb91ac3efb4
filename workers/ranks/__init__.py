"""Everything that imports torch or transformers: rank processes, never the supervisor."""
