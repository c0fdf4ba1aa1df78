"""The loop that owns time: stage by stage it measures rows, has weights quantised, hands the bytes to writers, and lets the
streams go on; after every layer it is in a journal how far it came."""
