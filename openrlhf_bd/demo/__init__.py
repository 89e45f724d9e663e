"""The embedded corpus, its teacher, and `make demo`: the main job on two CPU cores."""
