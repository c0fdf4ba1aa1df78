"""The forward pass in torch, streamed: one layer's attention or one expert in memory at a time."""
