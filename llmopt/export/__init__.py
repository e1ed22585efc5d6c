"""Writers of artifacts that engines load."""
