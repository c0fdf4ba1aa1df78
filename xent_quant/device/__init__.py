"""The operations of `formats` and `methods` that take time, in torch: for a GPU, and for any other device that torch knows."""
