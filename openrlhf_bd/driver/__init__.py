"""Control flow over actors: what runs when, on which resources. Ranks read rows from the store alone."""
