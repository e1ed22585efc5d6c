"""What an artifact can be written as, one file a format."""
