"""What each network is trained for: batches in, losses out."""
