"""Other people's checkpoints into model folders.  The quirks of a vendor's format end in the file named after it."""
