"""The calls of the client, by what they are about; each module is a part of ``gpuyard.client.Client``."""
