"""Checkpoints: the folder on disk (store), sharded tensors in files (shards), saving and resuming a
run (save_resume, pending)."""
