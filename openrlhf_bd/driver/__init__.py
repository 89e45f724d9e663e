"""Control flow over actors: what runs when, on which resources. Rows never pass through here."""
